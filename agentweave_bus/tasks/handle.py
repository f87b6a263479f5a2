"""Handles: what whoever submitted a task has in hand, to wait for it, watch it and cancel it.

A handle holds nothing that could be lost with it: everything it tells it has read from the task's log and
verified. So another handle, made of the task's reference in another process, tells the same. A reference is
one text: ``spiffe://shop.test/agent/order#create_order/0199…``.

While the broker can't be reached, whoever waits goes on waiting, and learns what happened when it is back.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple, Self

import anyio

from agentweave_bus.authz import AuditLog
from agentweave_bus.bus.connection import Keeper
from agentweave_bus.bus.slots import NoStreamError, NotReadableError
from agentweave_bus.exceptions import (
    AgentCallError,
    AgentWeaveError,
    AuthorizationError,
    BlobError,
    BusError,
    CallRefusedError,
    CallTimeoutError,
    ConfigurationError,
    IdempotencyError,
    InvalidSpiffeIdError,
    NoResponderError,
    TaskCanceledError,
    UnreachableError,
)
from agentweave_bus.names import CAPABILITY_NAME
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.approving import APPROVE, REJECT, Approver
from agentweave_bus.tasks.controls import CancelSender
from agentweave_bus.tasks.events import EventFeed, Position, TaskEvent, approval_of, whole_result
from agentweave_bus.tasks.hints import Hints, Waiting
from agentweave_bus.tasks.log import Desk, TaskLog
from agentweave_bus.tasks.record import StateRecord, TaskRef
from agentweave_bus.tasks.schedule import LastOccurrence, Schedule
from agentweave_bus.tasks.status import Occurrence, TaskStatus
from agentweave_bus.tasks.submitted import ParkedSubmissions, submission_of
from agentweave_bus.types import TaskResult, TaskState

__all__ = ["Handles", "TaskHandle", "TaskReference"]

_logger: Final = logging.getLogger(__name__)

_ID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[57][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_AUDIT_ID: Final = re.compile(r"\(audit id ([0-9a-f-]{1,64})\)$")
_LOOK_S: Final = 5.0
_REPEAT_S: Final = 1.0
_CANCEL_S: Final = 60.0
_DECIDE_S: Final = 10.0

_LATE_MS: Final = 10_000
"""How long after its end a task's worker may still record that it came too late."""


class TaskReference(NamedTuple):
    """What names a task wholly: for others than its submitter, ``@`` and who that is stand behind it."""

    target: SpiffeID
    capability: str
    id: str
    sender: SpiffeID | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``<target>#<capability>/<id>``, with ``@<sender>`` behind it or without.

        Raises:
            ConfigurationError: it names no task.

        """
        named, at, sender = text.partition("@")
        target, _, rest = named.partition("#")
        capability, _, task_id = rest.partition("/")
        if CAPABILITY_NAME.fullmatch(capability) and _ID.fullmatch(task_id):
            try:
                agent, by = SpiffeID(target), SpiffeID(sender) if at else None
            except InvalidSpiffeIdError:
                pass
            else:
                if agent.path and (by is None or by.path):
                    return cls(agent, capability, task_id, by)
        raise ConfigurationError(
            f"{text[:200]!r} names no task.",
            hint="A reference is <SPIFFE ID of the agent>#<capability>/<id>; `submit` prints it.",
        )

    def __str__(self) -> str:
        by = "" if self.sender is None else f"@{self.sender}"
        return f"{self.target}#{self.capability}/{self.id}{by}"


class _Means(NamedTuple):
    """What all handles of one identity work with. ``own_log`` is where a task's submission may stand."""

    desk: Desk
    hints: Hints
    cancels: CancelSender
    approver: Approver
    own_log: str | Path | None


class TaskHandle:
    """A task that was submitted; ``Client.submit`` and :meth:`Handles.named` make them.

    ``digest`` is that of the submitted head, in hexadecimal, as the audit logs have it; ``None`` for a handle
    made of a reference.
    """

    def __init__(
        self,
        ref: TaskRef,
        means: _Means,
        *,
        digest: bytes | None = None,
        pd: bytes | None = None,
        expires_ms: int | None = None,
        schedule: Schedule | None = None,
        parked: ParkedSubmissions | None = None,
    ) -> None:
        self._ref = ref
        self._desk, self._hints, self._cancels, self._approver, self._own_log = means
        self._digest = digest
        self._pd = None if pd is None else pd.hex()
        self._expires_ms = expires_ms
        self._schedule = schedule
        self._parked = parked  # where its schedule may be found, if it is not known
        self._trouble: BusError | None = None
        self._result: tuple[bytes, TaskResult] | None = None  # one that lay apart, and its record's digest

    # Of many handles only the ids are wanted: what reads the task's log is made when it is first needed.

    @cached_property
    def _log(self) -> TaskLog:
        return TaskLog(self._desk, self._ref)

    @cached_property
    def _reading(self) -> asyncio.Lock:
        """One log has one reader."""
        return asyncio.Lock()

    @cached_property
    def _last_occurrence(self) -> LastOccurrence:
        return LastOccurrence(self._desk, self._ref)

    @property
    def id(self) -> str:
        """The task's id."""
        return self._ref.id

    @property
    def target(self) -> str:
        """The SPIFFE ID of the agent that the task is for."""
        return str(self._ref.agent)

    @property
    def capability(self) -> str:
        """What it is asked for."""
        return self._ref.capability

    @property
    def reference(self) -> str:
        """The text that names this task, here and in any other process of this identity."""
        sender = None if self._ref.sender == self._approver.me else self._ref.sender
        return str(TaskReference(self._ref.agent, self._ref.capability, self._ref.id, sender))

    @property
    def full_reference(self) -> str:
        """The text that names it for everybody else, too: it says whose task it is."""
        return str(TaskReference(self._ref.agent, self._ref.capability, self._ref.id, self._ref.sender))

    @property
    def digest(self) -> str | None:
        """The digest of the submitted head, in hexadecimal, where it is known."""
        return None if self._digest is None else self._digest.hex()

    def __repr__(self) -> str:
        return f"<TaskHandle {self.reference}>"

    async def status(self) -> TaskStatus:
        """Look where the task stands.

        Raises:
            IdempotencyError: its id was used before, by the same idempotency key with another payload.
            AuthorizationError: the broker does not let this identity read it.
            UnreachableError: the task's log can't be read now; with ``NoResponderError`` the agent has none.

        """
        await self._look()
        if self._trouble is not None:
            raise self._unreadable(self._trouble) from self._trouble
        return await self._status()

    async def result(self, timeout: float | None = None) -> TaskResult:  # noqa: ASYNC109 - as of Client.call
        """Wait for the task's outcome: its result, also where that has failed.

        Without ``timeout`` (seconds) it waits as long as there can be one.

        Raises:
            TaskCanceledError: it was cancelled.
            AuthorizationError: the agent's policy does not allow it.
            CallRefusedError: the agent refused it for another reason.
            IdempotencyError: its id was used before, by the same idempotency key with another payload.
            CallTimeoutError: the time is up, and the task goes on; or it has expired without an outcome.

        """
        return self._outcome(*await self._ended(timeout))

    async def events(self, *, after: str | None = None) -> AsyncGenerator[TaskEvent]:
        """Yield what happens to the task, in order and each once, until it has ended.

        ``after`` is the cursor of the last event that was seen, in whatever process; without it everything
        is told from the beginning, as far as it is kept (progress: two days).

        Raises:
            ConfigurationError: ``after`` is no cursor.
            IdempotencyError, CallTimeoutError: as :meth:`result`.

        """
        feed = EventFeed(self._desk, self._log, Position.parse(after))
        async with self._hints.waiting(self._ref.key) as waiting:
            while True:
                await self._look()
                try:
                    async for event in feed.new():
                        waiting.found()
                        yield event
                except BusError as error:
                    self._trouble = error
                else:
                    if feed.ended:
                        return
                self._check_expired()
                await waiting.next_look()

    async def cancel(self, reason: str = "", *, timeout: float = _CANCEL_S) -> TaskStatus:  # noqa: ASYNC109
        """Have the task cancelled, and return how it ended; that may have been by itself meanwhile.

        It is said again every second, for ``timeout`` seconds at most. A handler that runs is cancelled and
        may clean up before.

        Raises:
            AuthorizationError: the broker does not let this identity cancel tasks there.
            CallRefusedError: it could not be recorded or said.
            CallTimeoutError: the task has not ended in that time. It may still be cancelled.
            IdempotencyError: as :meth:`result`.

        """
        try:
            async with asyncio.timeout(timeout), self._hints.waiting(self._ref.key) as waiting:
                said_at = float("-inf")
                while True:
                    if await self._look():
                        waiting.found()
                    if self._log.ended:
                        return await self._status()
                    if time.monotonic() >= said_at + _REPEAT_S and await self._say_cancel(reason):
                        said_at = time.monotonic()
                    await _first(waiting, _REPEAT_S)
        except TimeoutError:
            why = self._why()
            if self._log.last is None and self._digest is None and not why:
                why = (
                    ": it could not be told, for nothing is recorded of the task, and"
                    " its submission is not in this identity's audit log here"
                )
            why = why or f": no replica of {self._ref.agent} has heeded it, and nobody keeps it; cancel again"
            raise CallTimeoutError(
                f"task {self.id} has not ended within {timeout:g} s of its cancellation{why}"
            ) from None

    async def approve(self, reason: str = "", *, timeout: float = _DECIDE_S) -> TaskStatus:  # noqa: ASYNC109
        """Approve of a task that waits for it, and return where it stands once its agent has heeded that.

        Raises:
            AuthorizationError: this identity is none of those who may, or the broker does not let it.
            CallRefusedError: the task waits for nobody's approval, or it could not be recorded or said.
            CallTimeoutError: the agent has not heeded it within ``timeout`` seconds; an agent does not answer
                those whom its policy refuses.

        """
        await self._approver.decide(self._ref, APPROVE, reason, timeout_s=timeout)
        return await self.status()

    async def reject(self, reason: str = "", *, timeout: float = _DECIDE_S) -> TaskStatus:  # noqa: ASYNC109
        """End a task that waits for approval without one. Returns and raises as :meth:`approve`."""
        await self._approver.decide(self._ref, REJECT, reason, timeout_s=timeout)
        return await self.status()

    # --- reading -----------------------------------------------------------------------------------------

    async def _look(self) -> bool:
        """Read what was recorded since; return whether there was anything. Notes trouble, raises none."""
        async with self._reading:
            try:
                async with asyncio.timeout(_LOOK_S):
                    fresh = await self._log.refresh()
                self._trouble = None
            except BusError as error:
                fresh, self._trouble = False, error
            except TimeoutError:
                fresh, self._trouble = False, BusError("the broker does not answer")
        self._check_mine()
        return fresh

    def _unreadable(self, trouble: BusError) -> AgentCallError:
        """Say that the log can't be read; of a task that is somebody else's no more than that."""
        if isinstance(trouble, NotReadableError):
            return AuthorizationError(
                f"task {self.id} is not this identity's to read, if there is one: the broker shows it only"
                " those that a grant let it submit, or that it may decide on; the reference of another's task"
                " ends with '@' and who submitted it",
                reason="the broker's permissions",
                direction="broker",
            )
        if isinstance(trouble, NoStreamError):
            return NoResponderError(
                f"{self.target} has no tasks here: has a worker of it ever run, and is that its name?"
            )
        return UnreachableError(f"the log of task {self.id} can't be read: {trouble}")

    def _check_mine(self) -> None:
        records = self._log.records
        if records and self._pd is not None and records[0].body.pd != self._pd:
            raise IdempotencyError(
                f"the idempotency key of task {self.id} was used before, with another payload",
                task_id=self.id,
            )

    def _check_expired(self) -> None:
        """Give up on a task that nobody may begin any more, and of which nobody has recorded that."""
        last = self._log.last
        if self._expires_ms is None or self._trouble is not None:
            return
        if last is not None and (last.state is TaskState.WORKING or last.state.terminal):
            return
        if self._desk.clock_ms() > self._expires_ms + _LATE_MS:
            raise CallTimeoutError(
                f"task {self.id} has expired, and no worker of {self.target} has taken it up"
            )

    async def _ended(self, timeout_s: float | None) -> tuple[StateRecord, TaskResult | None]:
        try:
            async with asyncio.timeout(timeout_s), self._hints.waiting(self._ref.key) as waiting:
                while True:
                    if await self._look():
                        waiting.found()
                    last = self._log.last
                    if last is not None and last.state.terminal:
                        try:
                            return last, await self._result_of(last)
                        except BusError as error:
                            self._trouble = error
                    self._check_expired()
                    await waiting.next_look()
        except TimeoutError:
            raise CallTimeoutError(
                f"task {self.id} has no outcome yet, after {timeout_s:g} s; it goes on{self._why()}"
            ) from None

    def _why(self) -> str:
        return "" if self._trouble is None else f" (its log can't be read: {self._trouble})"

    # --- telling -----------------------------------------------------------------------------------------

    async def _status(self) -> TaskStatus:
        last = self._log.last
        due_at, every, occurrence = await self._times()
        if last is None:
            return TaskStatus(
                state=TaskState.SUBMITTED, due_at=due_at, every=every, last_occurrence=occurrence
            )
        try:
            result = await self._result_of(last)
        except BusError as error:
            raise UnreachableError(f"the result of task {self.id} can't be read: {error}") from error
        return TaskStatus(
            state=last.state,
            attempt=last.epoch,
            message=last.body.message,
            since_ms=last.at_ms,
            retry_at=last.body.retry_at,
            result=result,
            approval=approval_of(last),
            due_at=due_at,
            every=every,
            last_occurrence=occurrence,
            undoing=last.body.undoes is True,
        )

    async def _times(self) -> tuple[int | None, str | None, Occurrence | None]:
        """Return when it is due, and comes again, by what its submitter signed; and what of it began last."""
        async with self._reading:
            schedule = await self._scheduled()
            if schedule is None or (schedule.every is None and self._log.last is not None):
                return None, None, None
            now_ms = self._desk.clock_ms()
            due_at = None if self._log.ended else schedule.due_at(now_ms)
            try:
                async with asyncio.timeout(_LOOK_S):
                    found = await self._last_occurrence.look(schedule, now_ms)
            except (BusError, TimeoutError) as error:
                raise UnreachableError(f"the occurrences of task {self.id} can't be read: {error}") from error
        if found is None:
            return due_at, schedule.every, None
        ref, at_ms, state = found
        reference = str(TaskReference.parse(self.reference)._replace(id=ref.id))
        return due_at, schedule.every, Occurrence(id=ref.id, reference=reference, at_ms=at_ms, state=state)

    async def _scheduled(self) -> Schedule | None:
        """Return what its submission says of its times; looked for once in the submitter's own log."""
        parked, self._parked = self._parked, None
        if self._schedule is None and parked is not None and self._log.epoch == 0:
            try:
                self._schedule = await anyio.to_thread.run_sync(parked.schedule_of, self._ref)
            except OSError as error:
                _logger.warning("the audit log can't be read for task %s: %s", self.id, error)
        return self._schedule

    async def _result_of(self, record: StateRecord) -> TaskResult | None:
        """Return the result that a record holds, or refers to."""
        if self._result is not None and self._result[0] == record.digest:
            return self._result[1]
        try:
            result = await whole_result(self._desk, self._ref, record)
        except BlobError as error:
            told = f"the result of task {self.id}, which is {record.state.value}, can't be had: {error}"
            raise CallRefusedError(told, step="payload", reason=str(error)) from error
        if record.body.blob is not None and result is not None:
            self._result = record.digest, result
        return result

    def _outcome(self, record: StateRecord, result: TaskResult | None) -> TaskResult:
        if result is not None:
            return result
        if record.body.blob is not None:
            raise CallRefusedError(f"the result of task {self.id} is for its submitter alone", step="local")
        message = record.body.message or record.state.value
        if record.state is TaskState.CANCELED:
            raise TaskCanceledError(
                f"task {self.id} was cancelled: {message}", reason=message, task_id=self.id
            )
        audit_id, step = _audit_id(message), record.body.step or ""
        told = f"{self.target} refused task {self.id}: {message}"
        if step == "authorization":
            raise AuthorizationError(told, reason=message, audit_id=audit_id, direction="inbound")
        raise CallRefusedError(told, step=step, reason=message, audit_id=audit_id)

    async def _remember(self) -> None:
        """Look into the own audit log for what was submitted; once."""
        log, self._own_log = self._own_log, None
        if log is None:
            return
        try:
            found = await anyio.to_thread.run_sync(submission_of, log, self._ref)
        except OSError as error:
            _logger.warning("the audit log can't be read for task %s: %s", self.id, error)
            return
        if found is not None:
            self._digest, self._pd = found.digest, found.pd.hex()

    async def _say_cancel(self, reason: str) -> bool:
        """Say it once, if it is known of which head.

        Where only its reference is known, that stands in the own audit log, or in the task's first record.
        """
        last = self._log.last
        if last is None and self._digest is None:
            await self._remember()
        task, pd = (self._digest, self._pd) if last is None else (last.task, last.body.pd)
        if task is None or pd is None:
            return False
        try:
            await self._cancels.send(self._ref, task=task, pd=pd, reason=reason)
        except (BusError, UnreachableError) as error:
            self._trouble = self._trouble or BusError(str(error))
            return False
        except AgentCallError:
            raise
        except AgentWeaveError as error:
            raise CallRefusedError(f"the cancellation could not be said: {error}", step="local") from error
        return True


class Handles:
    """Makes the handles of one identity. Make it before the keeper opens.

    ``log`` is where its audit logs lie: in them the submission of a task is found of which only the reference
    is known.
    """

    def __init__(
        self, *, desk: Desk, keeper: Keeper, me: SpiffeID, audit: AuditLog, log: str | Path | None = None
    ) -> None:
        self._me = me
        self._parked = None if log is None else ParkedSubmissions(log, me)
        self._means = _Means(
            desk=desk,
            hints=Hints(me=me, keeper=keeper),
            cancels=CancelSender(desk=desk, keeper=keeper, me=me, audit=audit),
            approver=Approver(desk=desk, keeper=keeper, me=me, audit=audit),
            own_log=log,
        )

    def of(
        self,
        ref: TaskRef,
        digest: bytes | None = None,
        pd: bytes | None = None,
        expires_ms: int | None = None,
        schedule: Schedule | None = None,
    ) -> TaskHandle:
        """Return the handle of a task: the digests of its head and payload, and when it expires, if known.

        ``schedule`` is when it is due, of one that was parked.
        """
        parked = self._parked if digest is None and ref.sender == self._me else None
        return TaskHandle(
            ref, self._means, digest=digest, pd=pd, expires_ms=expires_ms, schedule=schedule, parked=parked
        )

    def named(self, reference: str) -> TaskHandle:
        """Return the handle of the task that a reference names. Raises ConfigurationError."""
        return self.of(self.ref_of(reference))

    def ref_of(self, reference: str) -> TaskRef:
        """Return which task a reference names. Raises ConfigurationError."""
        one = TaskReference.parse(reference)
        return TaskRef(one.target, one.sender or self._me, one.capability, one.id)

    @property
    def cancels(self) -> CancelSender:
        """What says that a task is to be cancelled, also of those whose records are not this identity's."""
        return self._means.cancels


def _audit_id(message: str) -> str:
    match = _AUDIT_ID.search(message)
    return match[1] if match else ""


async def _first(waiting: Waiting, seconds: float) -> None:
    """Wait for the next look, and no longer than so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            await waiting.next_look()
    except TimeoutError:
        return
