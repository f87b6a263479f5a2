"""Parking: how a task waits until somebody has approved of it.

It stays in its queue. Nobody acknowledges it, so it is lost with nobody; it is only given back with a long
delay, so it holds no worker. When it comes again, its log is looked at; a decision that stands there lets it
run or ends it, and when its time is up, whoever looks records that it is rejected.

Nobody waits for that look when a decision is made. Every replica hears of it, and the one that gave the task
back last gives it back once more, now without a delay: the broker then delivers it at once. Where that
replica is gone, the next look is at most a minute away; with more than 3,000 tasks that wait, one second for
each 50, so that one replica looks at no more than 50 in a second.
"""

from __future__ import annotations

import base64
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from agentweave_bus.authz import ApprovalTerms
from agentweave_bus.bus.refusal import Step
from agentweave_bus.tasks.approval import MOST_SHOWN_BYTES, Asked
from agentweave_bus.tasks.record import RecordBody
from agentweave_bus.types import TaskState

if TYPE_CHECKING:
    from agentweave_bus.bus.admitted import OpenedTask
    from agentweave_bus.tasks.log import TaskLog
    from agentweave_bus.tasks.queue import Acknowledgements, Delivery

__all__ = ["Parked", "Parking"]

_LOOK_S: Final = 60.0
_LOOKS_A_SECOND: Final = 50
_LATE_S: Final = 0.05
_FORGOTTEN_MS: Final = 5_000
"""So long after its next look was due, somebody else has had it."""

_MOST_PARKED: Final = 20_000
"""More than a queue gives out before some are acknowledged."""

_MAX_MESSAGE: Final = 2_000


class Parked(NamedTuple):
    """A delivery whose task may have to wait: its log, and the digests of its payload (hex) and its head."""

    delivery: Delivery
    log: TaskLog
    pd: str
    digest: bytes


class _Waiting(NamedTuple):
    delivery: Delivery
    due_ms: int


class Parking:
    """Lets tasks wait for approvals. ``clock_ms`` is in milliseconds since the epoch."""

    def __init__(self, acknowledgements: Acknowledgements, clock_ms: Callable[[], int]) -> None:
        self._acknowledgements = acknowledgements
        self._clock_ms = clock_ms
        self._waiting: OrderedDict[str, _Waiting] = OrderedDict()

    async def ask(self, task: Parked, terms: ApprovalTerms, opened: OpenedTask, reason: str) -> bool | None:
        """Put on record whose approval a task waits for, and let it wait.

        Returns False if somebody else has recorded something meanwhile, and ``None`` if it can't wait: who
        may approve has done so already, or there is no time left.

        Raises:
            BusError, EnvelopeError, SvidUnavailableError: it could not be recorded.

        """
        now_ms, approval = self._clock_ms(), task.log.approval
        asked = _asked(terms, opened, now_ms)
        if approval is not None and asked.refusal(approval.decided.by, now_ms) is None:
            return None  # the policy does not look at approvals, or says no all the same
        if now_ms >= asked.until:
            return None
        self._remember(task, asked.until)  # before anybody can decide
        body = RecordBody(
            state=TaskState.AUTH_REQUIRED, pd=task.pd, message=reason[:_MAX_MESSAGE], asked=asked
        )
        if await task.log.append(body, task.digest) is None:
            self._waiting.pop(task.log.ref.key, None)
            return False
        await self._give_back(task, asked.until)
        return True

    async def stays(self, task: Parked) -> bool:
        """Say whether a task is not to run now: it goes on waiting, or its time is up and it is rejected.

        Raises as :meth:`ask`.
        """
        log = task.log
        while log.last is not None and not log.ended:
            asked = log.last.body.asked
            if asked is None:
                approval = log.approval
                if approval is None or approval.begun or self._clock_ms() <= approval.asked.until:
                    return False
                await self._reject(task, f"approved by {approval.decided.by}, but not begun in time")
            elif self._clock_ms() > asked.until:
                await self._reject(task, "not approved in time")
            else:
                self._remember(task, asked.until)
                if not await log.refresh():
                    await self._give_back(task, asked.until)
                    return True
                self._waiting.pop(log.ref.key, None)
        if log.last is not None and log.last.state is TaskState.REJECTED and log.epoch == 0:
            await self._acknowledgements.done(task.delivery)
        else:  # it has ended otherwise, or was begun before, and there may be something to undo
            await self._acknowledgements.back(task.delivery, 0)
        return True

    async def wake(self, key: str) -> None:
        """Have the task ``key`` delivered at once, if it waits here."""
        waiting = self._waiting.pop(key, None)
        if waiting is not None:
            await self._acknowledgements.back(waiting.delivery, 0)

    async def _reject(self, task: Parked, message: str) -> None:
        body = RecordBody(
            state=TaskState.REJECTED, pd=task.pd, message=message, step=Step.AUTHORIZATION.label
        )
        await task.log.append(body, task.digest)

    def _remember(self, task: Parked, until_ms: int) -> None:
        key, now_ms = task.log.ref.key, self._clock_ms()
        due_ms = now_ms + int(self._pause_s(until_ms) * 1000)
        self._waiting.pop(key, None)
        self._waiting[key] = _Waiting(task.delivery._replace(data=b""), due_ms)
        while self._waiting:
            oldest = next(iter(self._waiting.values()))
            if len(self._waiting) <= _MOST_PARKED and oldest.due_ms + _FORGOTTEN_MS >= now_ms:
                return
            self._waiting.popitem(last=False)

    async def _give_back(self, task: Parked, until_ms: int) -> None:
        key = task.log.ref.key
        if key in self._waiting:
            await self._acknowledgements.back(task.delivery, self._pause_s(until_ms))
        if key not in self._waiting:  # it was decided on meanwhile
            await self._acknowledgements.back(task.delivery, 0)

    def _pause_s(self, until_ms: int) -> float:
        left_s = (until_ms - self._clock_ms()) / 1000 + _LATE_S
        return max(0.0, min(left_s, max(_LOOK_S, len(self._waiting) / _LOOKS_A_SECOND)))


def _asked(terms: ApprovalTerms, opened: OpenedTask, now_ms: int) -> Asked:
    request, asks = opened.request, opened.asks
    shown = request.payload if len(request.payload) <= MOST_SHOWN_BYTES else None
    return Asked(
        approvers=terms.approvers,
        until=min(terms.until_ms(now_ms), request.head.exp),
        involved=tuple(dict.fromkeys(str(one) for one in (asks.iss, *(link.iss for link in asks.via)))),
        payload=None if shown is None else base64.b64encode(shown).decode(),
    )
