"""Storing tasks: a signed head in the queue of the agent that it is for, or a word that it is not there.

A task counts as accepted when the broker has acknowledged it: on the very subject that it was asked to
answer on, and as stored in the queue of that agent. Where no clear word comes, the task is sealed again with
the same id and published again. That may store it twice; the agent sees by its log that the two are one, and
runs it once. So is an idempotency key: tasks of one sender for one capability with one key have one id.

What is sent carries no header. Deduplication by the broker (``Nats-Msg-Id``) is not used: it is a list in
which any sender could enter another one's id.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple
from uuid import NAMESPACE_URL, uuid5

from nats.aio.msg import Msg

from agentweave_bus.bus.connection import Keeper, NotPermittedError
from agentweave_bus.bus.slots import SlotOutcome, acknowledged
from agentweave_bus.bus.streams import parked_stream_name, tasks_stream_name
from agentweave_bus.bus.subjects import Priority, park_subject, task_subject
from agentweave_bus.envelope import (
    JSON_CONTENT_TYPE,
    Draft,
    Kind,
    Link,
    LogWitness,
    Sealed,
    Sealer,
    claim_key,
)
from agentweave_bus.exceptions import (
    AgentWeaveError,
    AuthorizationError,
    BusError,
    CallRefusedError,
    CallTimeoutError,
    NoResponderError,
    QueueFullError,
    UnreachableError,
)
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["Submission", "Submissions", "id_of_key"]

_ANSWER_S: Final = 5.0
_FIRST_PAUSE_S: Final = 0.1
_LAST_PAUSE_S: Final = 2.0
_REISSUE_BYTES: Final = 32 * 1024
"""By how much a parked task may grow when it is due: another head, signature and chain come with it."""


def id_of_key(sender: SpiffeID, agent: SpiffeID, capability: str, key: str) -> str:
    """Return the id of the task that ``sender`` submits under the idempotency key ``key``.

    It is a UUIDv5 (RFC 9562 section 5.5) over the four, so that the same key names the same task.
    """
    return str(uuid5(NAMESPACE_URL, claim_key(sender, agent, capability, key)))


class Submission(NamedTuple):
    """A task that is allowed and now to be stored. Times are in milliseconds since the epoch.

    One with ``due_ms`` is parked until then, and comes again as ``every`` says, where it says something.
    """

    agent: SpiffeID
    capability: str
    payload: bytes
    id: str
    expires_ms: int
    via: tuple[Link, ...] = ()
    scope: tuple[str, ...] | None = None
    principal: Mapping[str, str] | None = None
    idempotency_key: str | None = None
    priority: int | None = None
    retry: Mapping[str, int] | None = None
    trace: str | None = None
    due_ms: int | None = None
    every: str | None = None
    content_type: str = JSON_CONTENT_TYPE

    @property
    def place(self) -> tuple[str, str]:
        """The subject on which it is published, and the stream that stores it."""
        return _place(self.agent, self.capability, self.priority, parked=self.due_ms is not None)


@lru_cache(1024)  # many tasks go to few
def _place(agent: SpiffeID, capability: str, priority: int | None, *, parked: bool) -> tuple[str, str]:
    if parked:
        return park_subject(agent, capability), parked_stream_name(agent)
    return task_subject(agent, capability, Priority.of(priority)), tasks_stream_name(agent)


class Submissions:
    """Stores tasks for one identity.

    ``patience_s`` is how long it waits for a queue that nobody has made yet.
    """

    def __init__(
        self,
        *,
        keeper: Keeper,
        sealer: Sealer,
        clock_ms: Callable[[], int],
        witness: Callable[[], LogWitness | None],
        patience_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keeper = keeper
        self._sealer = sealer
        self._clock_ms = clock_ms
        self._witness = witness
        self._patience_s = patience_s
        self._monotonic = monotonic

    async def store(
        self,
        tasks: Sequence[Submission],
        on_sealed: Callable[[Sequence[tuple[int, Sealed]]], Awaitable[None]],
        *,
        timeout_s: float,
    ) -> list[Sealed | AgentWeaveError]:
        """Store tasks within ``timeout_s`` seconds; return the envelope of each, or why it is not stored.

        ``on_sealed`` is awaited with envelopes before they are sent, each beside the number of its task;
        when it raises, those are not sent. Instead of an envelope there is for a task

        - AuthorizationError: the broker does not let this identity submit that;
        - CallRefusedError: it is larger than the broker takes;
        - EnvelopeError, SvidUnavailableError: it can't be sealed;
        - QueueFullError: the agent's queue takes nothing more; it was not stored;
        - NoResponderError: the agent has no queue: no worker of it has ever run here;
        - CallTimeoutError: it may have been stored: no clear answer in time, or at an earlier attempt;
        - UnreachableError: there was no connection to the broker in time; it was not stored;
        - what ``on_sealed`` raised of this package's errors; it was not stored.
        """
        began = self._monotonic()
        until, patient_until = began + timeout_s, began + min(timeout_s, self._patience_s)
        pause, left = _FIRST_PAUSE_S, timeout_s
        pending = all_of_them = [_Pending(number, task) for number, task in enumerate(tasks)]
        while True:
            await self._attempt(pending, on_sealed, left)
            pending = [one for one in pending if one.ended is None]
            if pending:
                again_at = self._monotonic() + pause
                for one in pending:
                    one.give_up_if_over(again_at > until, again_at > patient_until)
                pending = [one for one in pending if one.ended is None]
            if not pending:
                return [one.ended for one in all_of_them if one.ended is not None]
            await asyncio.sleep(pause)
            pause, left = min(2 * pause, _LAST_PAUSE_S), until - self._monotonic()

    async def _attempt(
        self,
        pending: Sequence[_Pending],
        on_sealed: Callable[[Sequence[tuple[int, Sealed]]], Awaitable[None]],
        left_s: float,
    ) -> None:
        """Try once to store what is pending."""
        try:
            session = await self._keeper.session(max(0.0, left_s))
        except UnreachableError as error:
            for one in pending:
                one.not_sent(error, "the connection was lost")
            return
        sealed = await self._sealer.seal_all([self._draft(one.task) for one in pending])
        sent: list[tuple[_Pending, Sealed]] = []
        for one, envelope in zip(pending, sealed, strict=True):
            if isinstance(envelope, AgentWeaveError):
                one.not_sent(envelope, str(envelope))
            elif (fault := _too_large(one.task, len(envelope.frame), session.max_message_bytes)) is not None:
                one.ended = fault
            else:
                sent.append((one, envelope))
        if not sent:
            return
        try:
            await on_sealed([(one.number, envelope) for one, envelope in sent])
        except AgentWeaveError as error:
            for one, _ in sent:
                one.not_sent(error, str(error))
            return
        answers = await session.ask_all(
            [(envelope.head.sub, envelope.frame) for _, envelope in sent],
            timeout_s=min(_ANSWER_S, max(0.001, left_s)),
        )
        for (one, envelope), answer in zip(sent, answers, strict=True):
            one.answered(envelope, answer)

    def _draft(self, task: Submission) -> tuple[Draft, bytes, tuple[Link, ...]]:
        now_ms = self._clock_ms()
        draft: Draft = {
            "kind": Kind.TASK,
            "id": task.id,
            "aud": task.agent,
            "cap": task.capability,
            "sub": task.place[0],
            "ct": task.content_type,
            "iat": now_ms,
            "exp": max(task.expires_ms, now_ms + 1),
            "scope": task.scope,
            "prn": None if task.via else task.principal,
            "idk": task.idempotency_key,
            "prio": task.priority,
            "retry": task.retry,
            "nbf": task.due_ms,
            "every": task.every,
            "log": self._witness(),
            "trace": task.trace,
        }
        return draft, task.payload, task.via


class _Pending:
    """A task that is to be stored, and what has come of it."""

    __slots__ = ("ended", "number", "outcome", "task", "uncertain")

    def __init__(self, number: int, task: Submission) -> None:
        self.number = number
        self.task = task
        self.outcome = SlotOutcome.UNCLEAR
        self.uncertain = False
        """Whether it may have been stored although no clear word came."""
        self.ended: Sealed | AgentWeaveError | None = None

    def answered(self, sealed: Sealed, answer: Msg | BusError | TimeoutError) -> None:
        """Take note of what the broker said to ``sealed``, or of why it said nothing."""
        task = self.task
        if isinstance(answer, NotPermittedError):
            denied = AuthorizationError(
                f"the broker does not let this identity submit {task.capability!r} to {task.agent}:"
                " no grant covers it, or the broker has not been told of the grant yet",
                reason="the broker's permissions",
                direction="broker",
            )
            self.not_sent(denied, "the broker does not let this identity submit it any more")
            return
        stream = task.place[1]
        self.outcome = acknowledged(answer, stream) if isinstance(answer, Msg) else SlotOutcome.UNCLEAR
        self.uncertain |= self.outcome is SlotOutcome.UNCLEAR
        if self.outcome is SlotOutcome.WRITTEN:
            self.ended = sealed
        elif self.outcome is SlotOutcome.FULL:
            full = f"the queue of {task.agent} is full"
            self.not_sent(QueueFullError(f"{full}; nothing was stored"), full)

    def not_sent(self, error: AgentWeaveError, why: str) -> None:
        """End it because it is not stored, and can't be, unless an earlier attempt has stored it."""
        told = f"{why}; the task {self.task.id} may have been stored"
        self.ended = CallTimeoutError(told) if self.uncertain else error

    def give_up_if_over(self, over: bool, no_queue_in_time: bool) -> None:
        """End it if there is no time for another attempt."""
        if self.outcome is SlotOutcome.NOWHERE and not self.uncertain and no_queue_in_time:
            self.ended = NoResponderError(
                f"{self.task.agent} has no queue: has a worker of it ever run, and is that its name?"
            )
        elif over:
            self.ended = CallTimeoutError(
                f"no clear word from the broker in time; the task {self.task.id} may have been stored"
            )


def _too_large(task: Submission, size: int, most: int) -> CallRefusedError | None:
    most -= 0 if task.due_ms is None else _REISSUE_BYTES
    if size <= most:
        return None
    return CallRefusedError(
        f"the task takes {size} bytes; the broker lets {most} pass",
        step="local",
        reason="too large for the broker",
    )
