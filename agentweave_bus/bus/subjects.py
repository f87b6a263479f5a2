"""Subjects: where on the broker each kind of message travels.

Every subject is ``aw.<family>.<domain>.<agent>.…``. A trust domain or a path is one token of it:
``.`` is written ``=``, which no SPIFFE ID may hold, and the path loses its leading ``/``. So the
mapping has an inverse, and two agents can't share a subject::

    spiffe://acme-corp.io/agent/billing, process_billing, as a call
    aw.call.acme-corp=io.agent/billing.process_billing

Building and parsing are inverse functions of plain text. Nothing here knows a connection, and a
subject alone proves nothing about who sent to it: only the signed head does.

What is kept of a task names two agents, the called one (who writes) and the sender (who reads)::

    aw.state.acme-corp=io.agent/billing.acme-corp=io.agent/shop.<key>.<n>

A task of high or low priority has a subject of its own beside the one of all others. A capability's name
has no ``=``, so none can be taken for another, and who may submit to all of an agent's may submit to these::

    aw.task.acme-corp=io.agent/billing.process_billing=high
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final, NamedTuple

from agentweave_bus.exceptions import ConfigurationError, MalformedEnvelopeError
from agentweave_bus.names import CAPABILITY_NAME, EVENT_NAME, EVENT_PATTERN
from agentweave_bus.spiffe_id import SpiffeID

__all__ = [
    "ANNOUNCEMENTS",
    "MAX_SUBJECT_BYTES",
    "Family",
    "ParsedSubject",
    "Priority",
    "StateSubject",
    "agent_prefix",
    "announce_subject",
    "api_inbox",
    "blob_subject",
    "blobs_of",
    "call_subject",
    "check_capability",
    "claim_subject",
    "control_subject",
    "dead_subject",
    "event_pattern_subject",
    "event_subject",
    "park_subject",
    "parse_state_subject",
    "parse_subject",
    "progress_of_sender",
    "progress_subject",
    "pull_inbox",
    "record_subject",
    "records_of_sender",
    "records_of_task",
    "reply_inbox",
    "reply_subject",
    "slot_of",
    "step_subject",
    "task_subject",
    "wakeup_subject",
    "wakeups_prefix",
]

MAX_SUBJECT_BYTES: Final = 1024

_REMEMBERED: Final = 1024
_TOKEN: Final = re.compile(r"[A-Za-z0-9_=/-]+")
_KEY: Final = re.compile(r"[0-9a-f]{64}")
_SLOT: Final = re.compile(r"(0|[1-9][0-9]{0,8})|s[0-9a-f]{32}")
_STEP_DIGITS: Final = 32
_LOW_BELOW: Final = 4
_HIGH_FROM: Final = 7


class Family(StrEnum):
    """The second token of a subject: what kind of traffic it carries."""

    CALL = "call"
    TASK = "task"
    PARK = "park"
    EVENT = "event"
    PROGRESS = "progress"
    STATE = "state"
    CLAIM = "claim"
    BLOB = "blob"
    DEAD = "dead"
    CONTROL = "control"
    INBOX = "inbox"
    WAKEUP = "wakeup"


class Priority(StrEnum):
    """How urgent a task is: which of a capability's three queues it waits in. The most urgent comes first."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @classmethod
    def of(cls, level: int | None) -> Priority:
        """Return where tasks of a level from 0 to 9 wait: 0 to 3 low, 4 to 6 normal, 7 to 9 high.

        Without a level a task is a normal one.
        """
        if level is None or _LOW_BELOW <= level < _HIGH_FROM:
            return cls.NORMAL
        return cls.LOW if level < _LOW_BELOW else cls.HIGH


@dataclass(frozen=True, slots=True)
class ParsedSubject:
    """A subject, taken apart: its family, the agent that it belongs to, and the tokens that follow."""

    family: Family
    agent: SpiffeID
    rest: tuple[str, ...]


class StateSubject(NamedTuple):
    """Which slot of what is recorded of a task: whose task, by whom, its claim key, and the slot's number.

    Of a step there is no number, and the agent itself is the sender.
    """

    agent: SpiffeID
    sender: SpiffeID
    key: str
    slot: int | None


def check_capability(name: object) -> str:
    """Return ``name`` if it is a capability's name: ``[a-z0-9][a-z0-9_-]{0,63}``.

    Raises:
        ConfigurationError: it is not.

    """
    if not isinstance(name, str) or not CAPABILITY_NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} is no capability name: use 1 to 64 of a-z, 0-9, '_' and '-', a letter or digit first"
        )
    return name


def agent_prefix(family: Family, agent: SpiffeID) -> str:
    """Return the first four tokens of each subject of ``agent`` in ``family``."""
    return f"aw.{family}.{_tokens(agent)}"


@lru_cache(_REMEMBERED)
def _tokens(agent: SpiffeID) -> str:
    """Write an agent as the two tokens that stand for it."""
    if not agent.path:
        raise ConfigurationError(f"{agent} is a trust domain; a subject belongs to an agent below it")
    domain = agent.trust_domain.replace(".", "=")
    path = agent.path[1:].replace(".", "=")
    return f"{domain}.{path}"


def call_subject(callee: SpiffeID, capability: str) -> str:
    """Where calls of ``capability`` reach ``callee``."""
    return _call_subject(callee, check_capability(capability))


@lru_cache(_REMEMBERED)  # asked for several times in each call
def _call_subject(callee: SpiffeID, capability: str) -> str:
    return _bounded(f"{agent_prefix(Family.CALL, callee)}.{capability}")


def claim_subject(callee: SpiffeID, key: str) -> str:
    """Where ``callee`` claims the call whose claim key is ``key``."""
    return _bounded(f"{agent_prefix(Family.CLAIM, callee)}.{key}")


def task_subject(agent: SpiffeID, capability: str, priority: Priority = Priority.NORMAL) -> str:
    """Where durable tasks for ``capability`` of ``agent`` are queued."""
    return _task_subject(agent, check_capability(capability), priority)


@lru_cache(_REMEMBERED)
def _task_subject(agent: SpiffeID, capability: str, priority: Priority) -> str:
    suffix = "" if priority is Priority.NORMAL else f"={priority}"
    return _bounded(f"{agent_prefix(Family.TASK, agent)}.{capability}{suffix}")


def park_subject(agent: SpiffeID, capability: str) -> str:
    """Where tasks for ``capability`` of ``agent`` that are not due yet, or again and again, are kept."""
    return _bounded(f"{agent_prefix(Family.PARK, agent)}.{check_capability(capability)}")


def wakeups_prefix(trust_domain: str) -> str:
    """Return the first three tokens of the subjects of what the control role of a domain has to look at."""
    return f"aw.{Family.WAKEUP}.{trust_domain.replace('.', '=')}"


def wakeup_subject(trust_domain: str, stage: str, place: str, number: int) -> str:
    """Return the subject of one wake-up: ``stage`` is ``plan`` until it is due, and ``due`` then.

    ``place`` is one token that says where the parked task stands, ``number`` its sequence there.
    """
    if stage not in {"plan", "due"} or not _TOKEN.fullmatch(place):
        raise ConfigurationError(f"there is no {stage!r} of a wake-up for {place!r}")
    return _bounded(f"{wakeups_prefix(trust_domain)}.{stage}.{place}.{_count(number)}")


def record_subject(agent: SpiffeID, sender: SpiffeID, key: str, number: int) -> str:
    """Return the slot of record ``number``, from 0, of what ``sender`` had ``agent`` do.

    ``key`` is the task's claim key, 64 hexadecimal digits.
    """
    return slot_of(records_of_task(agent, sender, key), number)


def records_of_task(agent: SpiffeID, sender: SpiffeID, key: str) -> str:
    """Return what the slots of all records of one task begin with; the rest as of :func:`record_subject`."""
    return f"{_shared_prefix(Family.STATE, agent, sender)}.{_checked_key(key)}"


def slot_of(records: str, number: int) -> str:
    """Return the slot of record ``number``, from 0, of those that :func:`records_of_task` returned."""
    return _bounded(f"{records}.{_count(number)}")


def step_subject(agent: SpiffeID, key: str, step_name: str) -> str:
    """Return the slot of the result of ``agent``'s step ``step_name`` in the task ``key``.

    Only the agent itself reads its steps, so it stands in the sender's place. A step's name is any text,
    and its hash is what the subject holds.
    """
    digest = hashlib.sha256(step_name.encode("utf-8", "surrogatepass")).hexdigest()[:_STEP_DIGITS]
    mine = _tokens(agent)
    return _bounded(f"aw.{Family.STATE}.{mine}.{mine}.{_checked_key(key)}.s{digest}")


def progress_subject(agent: SpiffeID, sender: SpiffeID, key: str, number: int) -> str:
    """Return the slot of progress ``number``, from 0, that ``agent`` makes for ``sender`` in task ``key``."""
    return _bounded(f"{_shared_prefix(Family.PROGRESS, agent, sender)}.{_checked_key(key)}.{_count(number)}")


def records_of_sender(sender: SpiffeID) -> str:
    """Return the pattern of every record of what ``sender`` had anybody do."""
    return f"aw.{Family.STATE}.*.*.{_tokens(sender)}.>"


def progress_of_sender(sender: SpiffeID) -> str:
    """Return the pattern of all progress in what ``sender`` had anybody do."""
    return f"aw.{Family.PROGRESS}.*.*.{_tokens(sender)}.>"


def dead_subject(agent: SpiffeID, capability: str, key: str, epoch: int, part: str) -> str:
    """Return the slot of a dead letter of ``agent``: of task ``key``, given up in attempt ``epoch``.

    ``part`` is ``frame``, for the task as it came, ``record``, for why it was given up, or ``dropped``, for
    that an operator has dealt with it.

    Raises:
        ConfigurationError: there is no such part, or the subject would be too long.

    """
    if part not in {"frame", "record", "dropped"}:
        raise ConfigurationError(
            f"a dead letter has a 'frame', a 'record' and perhaps 'dropped', no {part!r}"
        )
    place = f"{agent_prefix(Family.DEAD, agent)}.{check_capability(capability)}"
    return _bounded(f"{place}.{_checked_key(key)}.{_count(epoch)}.{part}")


def event_subject(publisher: SpiffeID, name: str) -> str:
    """Where ``publisher`` publishes the event ``name``, whose parts are tokens of the subject.

    Raises:
        ConfigurationError: it is no event's name, or the subject would be too long.

    """
    if not EVENT_NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name[:80]!r} is no event's name: use 1 to 8 parts of a-z, 0-9, '_' and '-', joined by dots"
        )
    return _bounded(f"{agent_prefix(Family.EVENT, publisher)}.{name}")


def event_pattern_subject(publisher: SpiffeID, pattern: str) -> str:
    """Return the broker's pattern for those events of ``publisher`` for which ``pattern`` is (see names.py).

    Raises:
        ConfigurationError: it is no pattern of events.

    """
    if not EVENT_PATTERN.fullmatch(pattern):
        raise ConfigurationError(
            f"{pattern[:80]!r} is no pattern of events: write order.created, order.* or *"
        )
    below = f"{pattern[:-1]}>" if pattern.endswith("*") else pattern
    return _bounded(f"{agent_prefix(Family.EVENT, publisher)}.{below}")


def blob_subject(writer: SpiffeID, reader: SpiffeID, key: str, number: int) -> str:
    """Return the slot of chunk ``number``, from 0, of a blob of ``writer`` for ``reader``."""
    return _bounded(f"{blobs_of(writer, reader)}.{_checked_key(key)}.{_count(number)}")


def blobs_of(writer: SpiffeID, reader: SpiffeID) -> str:
    """Return the first six tokens of all that ``writer`` has stored apart for ``reader``."""
    return f"{agent_prefix(Family.BLOB, writer)}.{_tokens(reader)}"


def control_subject(agent: SpiffeID, verb: str) -> str:
    """Where ``agent`` is told to ``verb``; every replica hears it."""
    return _bounded(f"{agent_prefix(Family.CONTROL, agent)}.{check_capability(verb)}")


def announce_subject(agent: SpiffeID) -> str:
    """Where ``agent`` tells its control role which capabilities it serves."""
    return control_subject(agent, "announce")


ANNOUNCEMENTS: Final = f"aw.{Family.CONTROL}.*.*.announce"
"""The pattern of the subjects on which agents announce themselves."""


def api_inbox(agent: SpiffeID, instance: str) -> str:
    """Return the prefix under which a connection of ``agent`` receives the broker's own answers."""
    return _bounded(f"{agent_prefix(Family.INBOX, agent)}.{instance}.api")


def pull_inbox(agent: SpiffeID, instance: str) -> str:
    """Return the prefix under which a connection of ``agent`` receives the tasks that it pulls."""
    return f"{api_inbox(agent, instance)}.pull"


@lru_cache(_REMEMBERED)
def reply_inbox(agent: SpiffeID, instance: str) -> str:
    """Return the prefix under which a connection of ``agent`` receives its peers' answers."""
    return _bounded(f"{agent_prefix(Family.INBOX, agent)}.{instance}.rpc")


def reply_subject(caller: SpiffeID, instance: str, request_id: str) -> str:
    """Where the answer to ``request_id`` goes.

    Caller, instance and id all come from the signed head, so the broker has no say in it. Each
    request has a subject of its own, so that an answer says which it is for before it is opened.
    """
    return f"{reply_inbox(caller, instance)}.{request_id}"


def parse_subject(subject: str) -> ParsedSubject:
    """Take a subject apart; the inverse of the functions above.

    Raises:
        MalformedEnvelopeError: the text is no subject of this project.

    """
    tokens = subject.split(".")
    if len(tokens) < 5 or tokens[0] != "aw" or len(subject) > MAX_SUBJECT_BYTES:  # noqa: PLR2004 - aw, family, domain, agent, rest
        raise MalformedEnvelopeError("not a subject of this bus")
    if not all(_TOKEN.fullmatch(token) for token in tokens):
        raise MalformedEnvelopeError("a token of the subject is empty or has a character that none may have")
    try:
        family = Family(tokens[1])
    except ValueError as error:
        raise MalformedEnvelopeError("the subject names no family") from error
    return ParsedSubject(family, _agent_of(tokens[2], tokens[3]), tuple(tokens[4:]))


def parse_state_subject(subject: str) -> StateSubject:
    """Take the subject of a task's record or step apart; the inverse of the functions above.

    Raises:
        MalformedEnvelopeError: the text is no such subject.

    """
    parsed = parse_subject(subject)
    place = _SLOT.fullmatch(parsed.rest[-1])
    if parsed.family is not Family.STATE or len(parsed.rest) != 4 or place is None:  # noqa: PLR2004 - sender, key, slot
        raise MalformedEnvelopeError("not a subject of what is recorded of a task")
    domain, path, key, _ = parsed.rest
    sender = _agent_of(domain, path)
    if not _KEY.fullmatch(key) or (place[1] is None and sender != parsed.agent):
        raise MalformedEnvelopeError("not a subject of what is recorded of a task")
    return StateSubject(parsed.agent, sender, key, None if place[1] is None else int(place[1]))


def _agent_of(domain: str, path: str) -> SpiffeID:
    """Read the two tokens that stand for an agent."""
    if "/" in domain:  # part of a path could stand there, and two subjects would name one agent
        raise MalformedEnvelopeError("the subject's trust domain is none")
    try:
        return SpiffeID(f"spiffe://{domain.replace('=', '.')}/{path.replace('=', '.')}")
    except ValueError as error:
        raise MalformedEnvelopeError("the subject names no agent") from error


@lru_cache(_REMEMBERED)  # of one pair's tasks each has several such subjects
def _shared_prefix(family: Family, agent: SpiffeID, sender: SpiffeID) -> str:
    return f"aw.{family}.{_tokens(agent)}.{_tokens(sender)}"


def _checked_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ConfigurationError(f"a key is 64 hexadecimal digits, not {key[:80]!r}")
    return key


def _count(number: int) -> int:
    if number < 0:
        raise ConfigurationError(f"slots and attempts are counted from 0, so there is no {number}")
    return number


def _bounded(subject: str) -> str:
    if len(subject) > MAX_SUBJECT_BYTES:
        raise ConfigurationError(f"a subject has at most {MAX_SUBJECT_BYTES} bytes: {subject[:80]}…")
    return subject
