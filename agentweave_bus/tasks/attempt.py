"""One attempt at a task: what its runner is given and gives back, and what the broker hears meanwhile."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, NamedTuple, Protocol, Self

from agentweave_bus.bus.admitted import Admitted, OpenedTask
from agentweave_bus.tasks.log import TaskLog
from agentweave_bus.tasks.queue import Acknowledgements, Delivery
from agentweave_bus.tasks.record import ProgressMark, StateRecord

__all__ = ["Attempted", "Kept", "RunTask", "TaskRun"]

_log = logging.getLogger(__name__)


class TaskRun(NamedTuple):
    """One attempt at a task, for who runs it."""

    admitted: Admitted
    opened: OpenedTask
    log: TaskLog
    record: StateRecord
    """The record with which it began; its epoch counts attempts, from 1."""
    kept: Kept
    """For as long as this is kept up, the broker gives the task to nobody else."""
    last: bool
    """Whether there is no other attempt after it."""
    give_up: str | None = None
    """Why it is not run any more but only undone, as far as its steps are on record."""


class Attempted(NamedTuple):
    """What came of an attempt: a result in its JSON form, and whether another one may fare better.

    ``retry_after`` is in seconds, where the handler said so; ``correlation_id`` names a traceback in the log.
    """

    result: dict[str, Any]
    retry: bool = False
    retry_after: float | None = None
    correlation_id: str | None = None
    exhausted: bool = False
    """Whether it would be tried again if there were attempts left."""
    progress: ProgressMark | None = None
    undoing: bool = False
    """Whether the task has failed, and another pass is for undoing what it did."""
    not_undone: bool = False
    """Whether something is left of what it did, after this pass."""

    @property
    def failed(self) -> bool:
        """Whether the result says so."""
        return self.result.get("status") == "failed"


class RunTask(Protocol):
    """Runs an admitted task's handler, or undoes what earlier attempts did.

    ``result`` of what it returns may say ``failed``; it raises :class:`AttemptLostError` when somebody else
    has the task, and :class:`BusError` when a step could be neither read nor written.
    """

    async def __call__(self, run: TaskRun) -> Attempted:
        """Run one attempt."""


class Kept:
    """Tells the broker that a delivery is being worked on, for so many seconds and then no more."""

    def __init__(
        self, acknowledgements: Acknowledgements, delivery: Delivery, *, every_s: float, seconds: float
    ) -> None:
        self._acknowledgements = acknowledgements
        self._delivery = delivery
        self._every_s = every_s
        self._times = self._left = int(seconds / every_s) + 1
        self._timer: asyncio.TimerHandle | None = None
        self._telling: asyncio.Task[None] | None = None

    def extend(self) -> None:
        """Let the time begin anew: there was a sign of progress."""
        self._left = self._times

    async def __aenter__(self) -> Self:
        self._again()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.wait([self._telling])  # its cancellation is no news, this task's own goes on
            if not self._telling.cancelled():
                self._telling.result()

    def _again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._every_s, self._tell)

    def _tell(self) -> None:
        # A timer and not a task, because most attempts are over long before it goes off.
        if self._telling is None or self._telling.done():
            self._telling = asyncio.ensure_future(self._acknowledgements.keep(self._delivery))
        self._left -= 1
        if self._left > 0:
            self._again()
        else:
            _log.error("a task has not ended in its time; another worker will get it")
