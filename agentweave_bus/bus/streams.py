"""Streams and consumers: the declarations of what JetStream keeps, in one place.

The control role makes them (``control/reconcile.py``); workers only ever use them.

A claim stream holds one message per claimed call. It refuses a second message on a subject instead of
replacing the first, and nobody may delete or purge, so a claim, once made, stands until its age is up. It
takes messages of exactly a digest's size or less: the broker's own acknowledgements, which an agent could
have sent to any subject by naming it as the reply subject, are larger.

Who publishes events has one stream for them. It keeps the newest, up to its limits, and lets go of the oldest
for them; each of its subscribers has two consumers there, which keep count of what it was given.

An agent that serves durable tasks has four streams. Its queue lets go of a task when a worker acknowledges
it, and says no to more than it may hold. States, progress and dead letters are logs of slots that are written
once, as claims are. None of them, nor any other stream that agents may publish to, allows what a header could
ask for: rollups, times to live, schedules.

Tasks that are not due yet wait in a stream of their own (*parked*). When each is due the broker itself says,
by its message schedules, in the one stream that allows them: the control role's wake-ups. No agent may
publish there. Of a parked task the control role deletes the message when it is done with it; nobody else may
use that part of the broker's API.

What is too large for a message is stored apart, in a stream of whoever wrote it (*blobs*), in chunks that are
slots, too. It lasts as long as what refers to it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from agentweave_bus.bus.stream_limits import DEFAULT_STREAM_LIMITS, StreamLimits
from agentweave_bus.bus.subjects import (
    Family,
    Priority,
    agent_prefix,
    event_pattern_subject,
    task_subject,
    wakeups_prefix,
)
from agentweave_bus.envelope.blob import CHUNK_BYTES
from agentweave_bus.spiffe_id import SpiffeID

__all__ = [
    "CLAIM_MAX_AGE_S",
    "DEAD_MAX_AGE_S",
    "EVENT_MAX_AGE_S",
    "FILTER_KEY",
    "MAX_CONSUMERS",
    "NOT_STORED",
    "PARKED_CONSUMER",
    "PARKED_MAX_AGE_S",
    "PROGRESS_MAX_AGE_S",
    "STATE_MAX_AGE_S",
    "SUBJECT_FULL",
    "TASK_ACK_WAIT_S",
    "TASK_MAX_AGE_S",
    "ConsumerSpec",
    "StreamSpec",
    "blob_stream",
    "blob_stream_name",
    "claim_stream",
    "claim_stream_name",
    "dead_stream",
    "dead_stream_name",
    "event_consumer",
    "event_consumer_name",
    "events_stream",
    "events_stream_name",
    "parked_consumer",
    "parked_stream",
    "parked_stream_name",
    "progress_stream",
    "progress_stream_name",
    "state_stream",
    "state_stream_name",
    "task_consumer",
    "task_consumers",
    "task_streams",
    "tasks_stream",
    "tasks_stream_name",
    "wakeups_consumer",
    "wakeups_stream",
]

NOT_STORED: Final = 10077
SUBJECT_FULL: Final = "maximum messages per subject exceeded"
"""How JetStream refuses a second message on a subject that takes one: the err_code is that of any full
stream, the description is not."""

CLAIM_MAX_AGE_S: Final = 660
"""Longer than the longest call's lifetime plus clock skew on both sides, in seconds."""

_DAY_S: Final = 86_400

TASK_MAX_AGE_S: Final = 31 * _DAY_S
"""As long as a task may live at most."""

STATE_MAX_AGE_S: Final = DEFAULT_STREAM_LIMITS.record_age_s
"""Longer than any task: its outcome is remembered for as long as it could come again, or longer."""

PARKED_MAX_AGE_S: Final = TASK_MAX_AGE_S
"""A task is parked for no longer than it may live."""

PROGRESS_MAX_AGE_S: Final = 2 * _DAY_S

DEAD_MAX_AGE_S: Final = 90 * _DAY_S

EVENT_MAX_AGE_S: Final = 7 * _DAY_S
"""How long an event waits for subscribers that are not there."""

TASK_ACK_WAIT_S: Final = 30
"""A worker that says nothing of a task for so long has lost it, and another gets it."""

FILTER_KEY: Final = "agentweave.subject"
"""In a consumer's metadata: the subject that it is for. Its name holds only a hash of that."""

MAX_CONSUMERS: Final = 256
"""How many capabilities an agent can serve as durable tasks: each has consumers, which stay."""

PARKED_CONSUMER: Final = "parked"
"""The name of each stream's consumer of parked tasks: one for all, so that the control role's right to
acknowledge can be said in one pattern."""

_NANOSECONDS: Final = 1_000_000_000
_MAX_ACK_PENDING: Final = -1
"""Workers bound what they take. What waits for a retry counts, too, and must not keep the rest waiting."""
_SHORTEST_WINDOW: Final = 100_000_000
"""In nanoseconds. Nobody relies on JetStream's own deduplication: any sender chooses the ids it goes by."""

_MAX_PARKED: Final = 1_000_000
_MAX_PARKED_BYTES: Final = 1024**3
_MAX_PARKED_PENDING: Final = 1_000

_MAX_BLOBS_BYTES: Final = 4 * 1024**3

_MAX_EVENTS: Final = 1_000_000
_MAX_EVENT_CONSUMERS: Final = 1024
_MAX_EVENTS_PENDING: Final = 1_000

_CLAIM_BYTES: Final = 32
_MAX_CLAIMS: Final = 2_000_000
"""Held at once by one agent: 3,000 calls a second that are not safe, for as long as a claim stands."""


@dataclass(frozen=True, slots=True)
class StreamSpec:
    """A stream as it should be: its name and the configuration that JetStream's API takes."""

    name: str
    config: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ConsumerSpec:
    """A pull consumer as it should be: its stream, its name and what JetStream's API takes."""

    stream: str
    name: str
    config: dict[str, Any]


def claim_stream_name(agent: SpiffeID) -> str:
    """Return the name of the stream of ``agent``'s claims; a stream's name may hold no dot or slash."""
    return _name("claims", Family.CLAIM, agent)


def tasks_stream_name(agent: SpiffeID) -> str:
    """Return the name of the stream in which tasks for ``agent`` are queued."""
    return _name("tasks", Family.TASK, agent)


def state_stream_name(agent: SpiffeID) -> str:
    """Return the name of the stream of what ``agent`` records about its tasks and steps."""
    return _name("states", Family.STATE, agent)


def progress_stream_name(agent: SpiffeID) -> str:
    """Return the name of the stream of the progress that ``agent`` makes."""
    return _name("progress", Family.PROGRESS, agent)


def dead_stream_name(agent: SpiffeID) -> str:
    """Return the name of the stream of ``agent``'s dead letters."""
    return _name("dead", Family.DEAD, agent)


def blob_stream_name(writer: SpiffeID) -> str:
    """Return the name of the stream of what ``writer`` stores apart, because it is large."""
    return _name("blobs", Family.BLOB, writer)


def events_stream_name(publisher: SpiffeID) -> str:
    """Return the name of the stream of what ``publisher`` publishes."""
    return _name("events", Family.EVENT, publisher)


def parked_stream_name(agent: SpiffeID) -> str:
    """Return the name of the stream of tasks for ``agent`` that are not due yet."""
    return _name("parked", Family.PARK, agent)


def event_consumer_name(subscriber: SpiffeID, *, ordered: bool) -> str:
    """Return the name that ``subscriber``'s consumer has in each stream of events."""
    return f"{'o' if ordered else 'e'}-{_hashed(agent_prefix(Family.EVENT, subscriber))}"


@lru_cache(4096)  # asked for with each read of a slot
def _name(kind: str, family: Family, agent: SpiffeID) -> str:
    return f"{kind}-{_hashed(agent_prefix(family, agent))}"


def _hashed(text: str) -> str:
    return base64.b32encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=").lower()


def claim_stream(agent: SpiffeID, *, limits: StreamLimits = DEFAULT_STREAM_LIMITS) -> StreamSpec:
    """Declare the stream in which ``agent`` claims calls across its replicas and restarts."""
    return _stream(
        claim_stream_name(agent),
        f"calls claimed by {agent}",
        f"{agent_prefix(Family.CLAIM, agent)}.*",
        limits.replicas,
        {
            **_WRITTEN_ONCE,
            "max_age": CLAIM_MAX_AGE_S * _NANOSECONDS,
            "max_msgs": _MAX_CLAIMS,
            "max_msg_size": _CLAIM_BYTES,
            "allow_direct": False,
        },
    )


def task_streams(agent: SpiffeID, *, limits: StreamLimits = DEFAULT_STREAM_LIMITS) -> tuple[StreamSpec, ...]:
    """Declare all that an agent needs who serves durable tasks: queue, states, progress, dead letters.

    The queue comes last, so that nothing can be queued of which the outcome could not be recorded.
    """
    return (
        state_stream(agent, limits=limits),
        progress_stream(agent, limits=limits),
        dead_stream(agent, limits=limits),
        tasks_stream(agent, limits=limits),
    )


def tasks_stream(agent: SpiffeID, *, limits: StreamLimits = DEFAULT_STREAM_LIMITS) -> StreamSpec:
    """Declare the queue of tasks for ``agent``. A task leaves it when a worker acknowledges it."""
    return _stream(
        tasks_stream_name(agent),
        f"tasks for {agent}",
        f"{agent_prefix(Family.TASK, agent)}.*",
        limits.replicas,
        {
            "retention": "workqueue",
            "max_age": TASK_MAX_AGE_S * _NANOSECONDS,
            "max_msgs": limits.queue_tasks,
            "max_bytes": limits.queue_bytes,
            "max_consumers": MAX_CONSUMERS * len(Priority),
            "allow_direct": False,
        },
    )


def state_stream(agent: SpiffeID, *, limits: StreamLimits = DEFAULT_STREAM_LIMITS) -> StreamSpec:
    """Declare the stream of what ``agent`` records about tasks and steps."""
    family = agent_prefix(Family.STATE, agent)
    return _log_of_slots(
        state_stream_name(agent), f"states by {agent}", family, limits.record_age_s, limits.replicas
    )


def progress_stream(agent: SpiffeID, *, limits: StreamLimits = DEFAULT_STREAM_LIMITS) -> StreamSpec:
    """Declare the stream of the progress that ``agent`` makes."""
    family = agent_prefix(Family.PROGRESS, agent)
    name = progress_stream_name(agent)
    return _log_of_slots(name, f"progress by {agent}", family, PROGRESS_MAX_AGE_S, limits.replicas)


def dead_stream(agent: SpiffeID, *, limits: StreamLimits = DEFAULT_STREAM_LIMITS) -> StreamSpec:
    """Declare the stream of tasks that ``agent`` gave up. A full one refuses, and they stay in the queue."""
    family = agent_prefix(Family.DEAD, agent)
    name = dead_stream_name(agent)
    spec = _log_of_slots(name, f"dead letters of {agent}", family, DEAD_MAX_AGE_S, limits.replicas)
    return StreamSpec(name, {**spec.config, "max_bytes": limits.dead_bytes})


def blob_stream(writer: SpiffeID, *, limits: StreamLimits = DEFAULT_STREAM_LIMITS) -> StreamSpec:
    """Declare the stream of what ``writer`` stores apart; a full one refuses."""
    more = {
        **_WRITTEN_ONCE,
        "max_age": limits.record_age_s * _NANOSECONDS,
        "max_bytes": _MAX_BLOBS_BYTES,
        "max_msg_size": CHUNK_BYTES,
        "allow_direct": True,
    }
    family = agent_prefix(Family.BLOB, writer)
    return _stream(
        blob_stream_name(writer), f"large payloads of {writer}", f"{family}.>", limits.replicas, more
    )


def task_consumer(
    agent: SpiffeID,
    capability: str,
    priority: Priority = Priority.NORMAL,
    *,
    ack_wait_s: float | None = None,
) -> ConsumerSpec:
    """Declare the consumer that the workers of ``capability`` share for tasks of one priority.

    After ``ack_wait_s`` without a word from a worker its task is given to another one, by default 30 s.
    """
    subject = task_subject(agent, capability, priority)
    return _queue_consumer(
        tasks_stream_name(agent),
        subject,
        f"workers of {capability} of {agent}, {priority} priority",
        max_ack_pending=_MAX_ACK_PENDING,
        ack_wait_s=ack_wait_s,
    )


def task_consumers(
    agent: SpiffeID, capability: str, *, ack_wait_s: float | None = None
) -> tuple[ConsumerSpec, ...]:
    """Declare all that the workers of ``capability`` share, for the most urgent tasks first."""
    return tuple(task_consumer(agent, capability, one, ack_wait_s=ack_wait_s) for one in Priority)


def parked_stream(agent: SpiffeID, *, limits: StreamLimits = DEFAULT_STREAM_LIMITS) -> StreamSpec:
    """Declare the stream of tasks for ``agent`` that are not due yet; a full one refuses."""
    return _stream(
        parked_stream_name(agent),
        f"tasks for {agent} that are not due",
        f"{agent_prefix(Family.PARK, agent)}.*",
        limits.replicas,
        {
            "retention": "limits",
            "max_age": PARKED_MAX_AGE_S * _NANOSECONDS,
            "max_msgs": _MAX_PARKED,
            "max_bytes": _MAX_PARKED_BYTES,
            "max_consumers": 1,
            "allow_direct": False,
            "deny_delete": False,
        },
    )


def parked_consumer(agent: SpiffeID) -> ConsumerSpec:
    """Declare by what the control role learns of each task that is parked."""
    stream = parked_stream_name(agent)
    subject = f"{agent_prefix(Family.PARK, agent)}.*"
    return _queue_consumer(
        stream, subject, f"parked for {agent}", max_ack_pending=_MAX_PARKED_PENDING, name=PARKED_CONSUMER
    )


def wakeups_stream(trust_domain: str, *, limits: StreamLimits = DEFAULT_STREAM_LIMITS) -> StreamSpec:
    """Declare the stream in which the broker tells the control role of a domain what is due.

    It alone has message schedules, with which rollups and purges come. It has no limit of its own: there is
    one message for each parked task, and the broker would make room by forgetting the oldest.
    """
    subject = f"{wakeups_prefix(trust_domain)}.>"
    return _stream(
        f"wakeups-{_hashed(subject)}",
        f"what is due in {trust_domain}",
        subject,
        limits.replicas,
        {
            "retention": "workqueue",
            "discard": "old",
            "max_age": STATE_MAX_AGE_S * _NANOSECONDS,
            "max_consumers": 1,
            "allow_direct": False,
            "deny_purge": False,
            "allow_rollup_hdrs": True,
            "allow_msg_schedules": True,
        },
    )


def wakeups_consumer(trust_domain: str) -> ConsumerSpec:
    """Declare what the control roles of a domain share: those wake-ups that are due."""
    subject = f"{wakeups_prefix(trust_domain)}.due.>"
    stream = wakeups_stream(trust_domain).name
    return _queue_consumer(stream, subject, f"due in {trust_domain}", max_ack_pending=_MAX_PARKED_PENDING)


def _queue_consumer(
    stream: str,
    subject: str,
    description: str,
    *,
    max_ack_pending: int,
    name: str | None = None,
    ack_wait_s: float | None = None,
) -> ConsumerSpec:
    name = name or f"c-{_hashed(subject)}"
    wait_s = TASK_ACK_WAIT_S if ack_wait_s is None else ack_wait_s
    return ConsumerSpec(
        stream,
        name,
        {
            "durable_name": name,
            "name": name,
            "description": description,
            "filter_subject": subject,
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "ack_wait": round(wait_s * _NANOSECONDS),
            "max_deliver": -1,
            "max_ack_pending": max_ack_pending,
            "replay_policy": "instant",
            "metadata": {FILTER_KEY: subject},
        },
    )


def events_stream(publisher: SpiffeID, *, limits: StreamLimits = DEFAULT_STREAM_LIMITS) -> StreamSpec:
    """Declare the stream of what ``publisher`` publishes: bounded in age, number and bytes."""
    return _stream(
        events_stream_name(publisher),
        f"events of {publisher}",
        f"{agent_prefix(Family.EVENT, publisher)}.>",
        limits.replicas,
        {
            "retention": "limits",
            "discard": "old",
            "max_age": EVENT_MAX_AGE_S * _NANOSECONDS,
            "max_msgs": _MAX_EVENTS,
            "max_bytes": limits.event_bytes,
            "max_consumers": _MAX_EVENT_CONSUMERS,
            "allow_direct": False,
        },
    )


def event_consumer(
    publisher: SpiffeID, subscriber: SpiffeID, patterns: Iterable[str], *, ordered: bool
) -> ConsumerSpec:
    """Declare what all replicas of ``subscriber`` share of ``publisher``'s events.

    ``patterns`` must not overlap. An ``ordered`` one gives out one event at a time, and the next when that
    is acknowledged. It begins with what is published after it was made.
    """
    name = event_consumer_name(subscriber, ordered=ordered)
    return ConsumerSpec(
        events_stream_name(publisher),
        name,
        {
            "durable_name": name,
            "name": name,
            "description": f"events of {publisher} for {subscriber}",
            "filter_subjects": sorted(event_pattern_subject(publisher, one) for one in patterns),
            "deliver_policy": "new",
            "ack_policy": "explicit",
            "ack_wait": TASK_ACK_WAIT_S * _NANOSECONDS,
            "max_deliver": -1,
            "max_ack_pending": 1 if ordered else _MAX_EVENTS_PENDING,
            "replay_policy": "instant",
            "metadata": {FILTER_KEY: agent_prefix(Family.EVENT, subscriber)},
        },
    )


_WRITTEN_ONCE: Final = {"retention": "limits", "discard_new_per_subject": True, "max_msgs_per_subject": 1}


def _log_of_slots(name: str, description: str, family: str, max_age_s: int, replicas: int) -> StreamSpec:
    more = {**_WRITTEN_ONCE, "max_age": max_age_s * _NANOSECONDS, "allow_direct": True}
    return _stream(name, description, f"{family}.>", replicas, more)


def _stream(name: str, description: str, subject: str, replicas: int, more: dict[str, Any]) -> StreamSpec:
    """Declare a stream in what all have in common: nothing is replaced, removed or done by a header."""
    common = {
        "name": name,
        "description": description,
        "subjects": [subject],
        "storage": "file",
        "discard": "new",
        "duplicate_window": _SHORTEST_WINDOW,
        "num_replicas": replicas,
        "deny_delete": True,
        "deny_purge": True,
        "allow_rollup_hdrs": False,
        "allow_msg_ttl": False,
        "allow_msg_schedules": False,
    }
    return StreamSpec(name, common | more)
