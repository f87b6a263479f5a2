"""A delivery that was opened, and the log of its task: what a worker has in hand while it deals with one."""

from __future__ import annotations

from typing import Any, NamedTuple

from agentweave_bus.bus.admitted import OpenedTask
from agentweave_bus.tasks.log import TaskLog
from agentweave_bus.tasks.parking import Parked
from agentweave_bus.tasks.queue import Delivery
from agentweave_bus.tasks.record import RecordBody
from agentweave_bus.tasks.redrive import redrive_evidence, redriven_attempt
from agentweave_bus.types import TaskState

__all__ = ["Case"]


class Case(NamedTuple):
    """A delivery that was opened, and the log of its task."""

    delivery: Delivery
    opened: OpenedTask
    log: TaskLog

    @property
    def digest(self) -> bytes:
        """The digest of the task's head, which its records name."""
        return self.opened.asks.digest

    @property
    def redrive(self) -> int:
        """The attempt with which this redrive begins; 0 for a task as it was submitted."""
        return redriven_attempt(self.opened.request.head)

    def tries(self, epoch: int) -> int:
        """Say the how many-th attempt one is, of those of this run that count."""
        return epoch - max(0, self.redrive - 1) - self.log.given_back

    @property
    def parked(self) -> Parked:
        """The same, for whoever lets it wait."""
        return Parked(self.delivery, self.log, self.opened.request.head.pd.hex(), self.digest)

    def body(self, state: TaskState, **more: Any) -> RecordBody:
        """Return what the record of a state says."""
        return RecordBody(state=state, pd=self.opened.request.head.pd.hex(), **more)

    def working(self, *, undoes: bool) -> RecordBody:
        """Return what the record says with which the next attempt, or a pass that only undoes, begins."""
        log = self.log
        if not log.records:  # as of most tasks: named here, the record is not made anew when it is written
            return self.body(TaskState.WORKING, undoes=undoes or None, task=log.ref.named)
        if not log.ended:
            return self.body(TaskState.WORKING, undoes=(undoes or log.undoing) or None)
        return self.body(TaskState.WORKING, redrive=redrive_evidence(self.opened.request.link))
