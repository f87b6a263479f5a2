"""A delivery that was opened, and the log of its task: what a worker has in hand while it deals with one."""

from __future__ import annotations

from typing import Any

from agentweave_bus.bus.admitted import OpenedTask
from agentweave_bus.tasks.log import TaskLog
from agentweave_bus.tasks.parking import Parked
from agentweave_bus.tasks.queue import Delivery
from agentweave_bus.tasks.record import RecordBody
from agentweave_bus.tasks.redrive import redrive_evidence, redriven_attempt
from agentweave_bus.types import TaskState

__all__ = ["Case"]


class Case:
    """A delivery that was opened, and the log of its task. What never changes is looked up once.

    ``digest`` is that of the task's head, which its records name, and ``pd`` its payload's, in hexadecimal.
    ``redrive`` is the attempt with which this redrive begins; 0 for a task as it was submitted.
    """

    __slots__ = ("delivery", "digest", "log", "opened", "pd", "redrive")

    def __init__(self, delivery: Delivery, opened: OpenedTask, log: TaskLog) -> None:
        head = opened.request.head
        self.delivery = delivery
        self.opened = opened
        self.log = log
        self.digest = opened.asks.digest
        self.pd = head.pd.hex()
        self.redrive = redriven_attempt(head)

    def tries(self, epoch: int) -> int:
        """Say the how many-th attempt one is, of those of this run that count."""
        return epoch - max(0, self.redrive - 1) - self.log.given_back

    @property
    def parked(self) -> Parked:
        """The same, for whoever lets it wait."""
        return Parked(self.delivery, self.log, self.pd, self.digest)

    def body(self, state: TaskState, **more: Any) -> RecordBody:
        """Return what the record of a state says."""
        return RecordBody(state=state, pd=self.pd, **more)

    def working(self, *, undoes: bool) -> RecordBody:
        """Return what the record says with which the next attempt, or a pass that only undoes, begins."""
        log = self.log
        if not log.records:  # as of most tasks: named here, the record is not made anew when it is written
            return self.body(TaskState.WORKING, undoes=undoes or None, task=log.ref.named)
        if not log.ended:
            return self.body(TaskState.WORKING, undoes=(undoes or log.undoing) or None)
        return self.body(TaskState.WORKING, redrive=redrive_evidence(self.opened.request.link))
