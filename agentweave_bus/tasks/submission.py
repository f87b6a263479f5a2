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
from collections.abc import Awaitable, Callable, Mapping
from functools import lru_cache
from typing import Final, NamedTuple
from uuid import NAMESPACE_URL, uuid5

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
        self, task: Submission, on_sealed: Callable[[Sealed], Awaitable[None]], *, timeout_s: float
    ) -> Sealed:
        """Store a task within ``timeout_s`` seconds and return its envelope.

        ``on_sealed`` is awaited with each envelope before it is sent; what it raises ends the submission.

        Raises:
            AuthorizationError: the broker does not let this identity submit that.
            CallRefusedError: it is larger than the broker takes.
            QueueFullError: the agent's queue takes nothing more; nothing was stored.
            NoResponderError: the agent has no queue: no worker of it has ever run here.
            CallTimeoutError: no clear answer in time; the task may have been stored.
            UnreachableError: there was no connection to the broker in time; nothing was stored.

        """
        began = self._monotonic()
        until, patient_until = began + timeout_s, began + min(timeout_s, self._patience_s)
        pause, in_doubt, left = _FIRST_PAUSE_S, False, timeout_s
        while True:
            outcome, sealed = await self._attempt(task, on_sealed, left, in_doubt=in_doubt)
            if outcome is SlotOutcome.WRITTEN:
                return sealed
            now = self._monotonic()
            if outcome is SlotOutcome.FULL:
                raise QueueFullError(f"the queue of {task.agent} is full; nothing was stored")
            if outcome is SlotOutcome.NOWHERE and not in_doubt and now + pause > patient_until:
                raise NoResponderError(
                    f"{task.agent} has no queue: has a worker of it ever run, and is that its name?"
                )
            in_doubt |= outcome is SlotOutcome.UNCLEAR
            if now + pause > until:
                raise CallTimeoutError(
                    f"no clear word from the broker in time; the task {task.id} may have been stored"
                )
            await asyncio.sleep(pause)
            pause, left = min(2 * pause, _LAST_PAUSE_S), until - self._monotonic()

    async def _attempt(
        self,
        task: Submission,
        on_sealed: Callable[[Sealed], Awaitable[None]],
        left_s: float,
        *,
        in_doubt: bool,
    ) -> tuple[SlotOutcome, Sealed]:
        try:
            session = await self._keeper.session(max(0.0, left_s))
        except UnreachableError:
            if not in_doubt:
                raise
            raise CallTimeoutError(
                f"the connection was lost; the task {task.id} may have been stored"
            ) from None
        now_ms = self._clock_ms()
        subject, stream = task.place
        draft: Draft = {
            "kind": Kind.TASK,
            "id": task.id,
            "aud": task.agent,
            "cap": task.capability,
            "sub": subject,
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
        sealed = await self._sealer.seal(draft, task.payload, task.via)
        most = session.max_message_bytes - (0 if task.due_ms is None else _REISSUE_BYTES)
        if len(sealed.frame) > most:
            raise CallRefusedError(
                f"the task takes {len(sealed.frame)} bytes; the broker lets {most} pass",
                step="local",
                reason="too large for the broker",
            )
        await on_sealed(sealed)
        try:
            timeout_s = min(_ANSWER_S, max(0.001, left_s))
            return acknowledged(await session.ask(subject, sealed.frame, timeout_s=timeout_s), stream), sealed
        except NotPermittedError:
            raise AuthorizationError(
                f"the broker does not let this identity submit {task.capability!r} to {task.agent}:"
                " no grant covers it, or the broker has not been told of the grant yet",
                reason="the broker's permissions",
                direction="broker",
            ) from None
        except (TimeoutError, BusError):
            return SlotOutcome.UNCLEAR, sealed
