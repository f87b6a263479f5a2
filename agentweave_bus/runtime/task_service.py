"""Serving durable tasks: an agent's queues, pulled from while it serves.

Each capability has a queue of its own and at most so many attempts at once. What a worker is doing when it is
told to stop it may finish, for as long as calls may; what is left then goes back to the queues.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import cached_property
from typing import Final

from agentweave_bus.agent import BoundCapability
from agentweave_bus.agent.lifecycle import HEALTH
from agentweave_bus.agent.records import StepRecord
from agentweave_bus.bus.admission import Admission
from agentweave_bus.bus.admitted import OpenedTask
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.envelope import control_role
from agentweave_bus.runtime.wiring import Connected, server_id
from agentweave_bus.tasks.announcing import Announcer
from agentweave_bus.tasks.approving import Approvals
from agentweave_bus.tasks.attempt import RunTask, TaskRun
from agentweave_bus.tasks.backlog import Backlog
from agentweave_bus.tasks.controls import Controls
from agentweave_bus.tasks.dead_letters import DeadLetters
from agentweave_bus.tasks.log import Desk
from agentweave_bus.tasks.performer import Performer
from agentweave_bus.tasks.progress import ProgressWriter
from agentweave_bus.tasks.pulling import drained
from agentweave_bus.tasks.queue import Acknowledgements
from agentweave_bus.tasks.record import ProgressMark
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.tasks.step_log import StepLog
from agentweave_bus.tasks.task_puller import TaskPuller
from agentweave_bus.tasks.traced_deliveries import traced_deliveries
from agentweave_bus.types import Artifact

__all__ = ["Steps", "TaskService", "Telling"]

_RETRY: Final = Retry()
"""How a task is tried again whose capability does not say."""


class TaskService:
    """The queues of one served agent. ``dispatch`` runs one attempt in its context."""

    def __init__(
        self,
        parts: Connected,
        admission: Admission,
        table: Mapping[str, BoundCapability],
        dispatch: RunTask,
    ) -> None:
        self._table = {name: bound for name, bound in table.items() if name != HEALTH}
        self._seconds = parts.config.bus.task_timeout
        self._drain_s = parts.config.bus.drain_timeout
        acknowledgements = Acknowledgements(parts.keeper)
        self.performer = Performer(
            me=parts.me,
            admission=admission,
            desk=parts.desk,
            dead_letters=DeadLetters(parts.me, parts.desk, parts.metrics.given_up),
            acknowledgements=acknowledgements,
            audit=parts.audit,
            metrics=parts.metrics,
            run=dispatch,
            rule_of=self._rule_of,
            seconds_of=self._seconds_of,
            ack_wait_s=parts.config.bus.task_ack_wait,
        )
        self._controls = Controls(
            desk=parts.desk,
            keeper=parts.keeper,
            me=parts.me,
            capabilities=self._table,
            authorizer=parts.authorizer,
            audit=parts.audit,
            on_cancel=self.performer.cancel,
        )
        self._approvals = Approvals(
            desk=parts.desk,
            keeper=parts.keeper,
            me=parts.me,
            capabilities=self._table,
            authorizer=parts.authorizer,
            audit=parts.audit,
            wake=self.performer.wake,
        )
        self.backlog = Backlog(parts.me, self._table, keeper=parts.keeper, metrics=parts.metrics)
        self._pullers: list[TaskPuller] = []
        if not self._table:
            return
        announcer = Announcer(
            parts.me,
            control_role(server_id(parts.config).trust_domain),  # whoever looks after the broker
            self._table,
            sealer=parts.sealer,
            clock_ms=parts.surroundings.clock_ms,
            ack_wait_s=parts.config.bus.task_ack_wait,
            monotonic=parts.surroundings.monotonic_s,
        )
        parts.keeper.on_session(announcer.greet)
        for name in self._table:
            parts.metrics.declare_queue(name)
        self._pullers = [
            TaskPuller(
                parts.me,
                name,
                keeper=parts.keeper,
                concurrency=bound.concurrency or parts.config.bus.task_concurrency,
                perform=traced_deliveries(parts.tracing, self.performer.perform),
                announce=announcer.announce,
                monotonic=parts.surroundings.monotonic_s,
            )
            for name, bound in self._table.items()
        ]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Pull for the length of the block; at its end what still runs is given back."""
        async with self._controls.running(), self._approvals.running(), owned_tasks() as group:
            for puller in self._pullers:
                group.start_soon(puller.run)
            try:
                yield
            finally:
                group.cancel_scope.cancel()

    @property
    def idle_s(self) -> float | None:
        """For how long a queue was asked for nothing although there is room, in seconds; else ``None``."""
        return max((idle for one in self._pullers if (idle := one.idle_s) is not None), default=None)

    async def drain(self) -> None:
        """Take nothing more, and return when what runs has ended.

        What has not ended after a while is given back: another worker begins it at once, and it counts as no
        attempt.
        """
        await drained(self._pullers, self._drain_s, "tasks")

    def _rule_of(self, opened: OpenedTask) -> Retry:
        bound = self._table[opened.capability.name]
        return (bound.retry or _RETRY).narrowed(opened.request.head.retry)

    def _seconds_of(self, opened: OpenedTask) -> float:
        return self._table[opened.capability.name].timeout or self._seconds


class Steps:
    """Where the steps of one attempt are on record; see ``agent.records.StepStore``.

    A redrive lets a task begin anew, and keeps what was done: what a step has returned it returns again,
    unless that was undone when the task failed. Steps that failed run again. So each run of the task has
    names of its own, but for the list of what there may be to undo, which goes on.
    """

    def __init__(self, parts: Connected, run: TaskRun) -> None:
        self._parts = parts
        self._run = run

    # These two when they are asked for: most handlers take no steps.

    @cached_property
    def _log(self) -> StepLog:
        parts, run = self._parts, self._run
        return StepLog(
            parts.desk,
            run.log,
            run.record,
            largest=lambda: parts.keeper.max_message_bytes,
            monotonic=parts.surroundings.monotonic_s,
        )

    @cached_property
    def _runs(self) -> list[int]:
        run = self._run
        begun = (one.epoch for one in run.log.records if one.body.redrive is not None)
        return [0, *(epoch for epoch in begun if epoch <= run.record.epoch)]

    async def load(self, name: str) -> StepRecord | None:
        """Return what was saved under ``name``."""
        found = await self._load(name, self._runs[-1])
        if found is not None or ":" in name:
            return found
        for run in reversed(self._runs[:-1]):
            if await self._load(f"undo:{name}", run) is not None:
                return None
            found = await self._load(name, run)
            if found is not None:
                return found if found.error is None else None
        return None

    async def _load(self, name: str, run: int) -> StepRecord | None:
        found = await self._log.load(_in_run(name, run))
        return None if found is None else StepRecord.from_json(found)

    async def confirm(self) -> None:
        """Make sure that the task is still this attempt's."""
        await self._log.confirm()

    async def save(self, name: str, record: StepRecord) -> StepRecord:
        """Write a step down, once."""
        await self._log.save(_in_run(name, self._runs[-1]), record.to_json())
        return record


def _in_run(name: str, run: int) -> str:
    """Return under what a name stands in a run of the task, which began with the attempt ``run``."""
    announced = name.startswith("saga:") and name.removeprefix("saga:").isdecimal()
    return name if announced or not run else f"{run}/{name}"


class Telling:
    """Where the progress of one attempt goes; each sign of it keeps the task, too.

    What writes it is made for the first sign: most attempts give none.
    """

    def __init__(self, desk: Desk, run: TaskRun) -> None:
        self._desk = desk
        self._run = run
        self._writer: ProgressWriter | None = None
        self._over = False

    async def progress(self, fraction: float, message: str) -> None:
        """Tell how much is done."""
        self._run.kept.extend()
        await (await self._begun()).progress(fraction, message)

    async def artifact(self, artifact: Artifact) -> None:
        """Hand over a part of the result."""
        self._run.kept.extend()
        await (await self._begun()).artifact(artifact)

    async def finish(self) -> None:
        """Write what was told last; see :meth:`.ProgressWriter.finish`."""
        self._over = True
        if self._writer is not None:
            await self._writer.finish()

    def mark(self) -> ProgressMark | None:
        """How much of it stands, for the record of the outcome."""
        return None if self._writer is None else self._writer.mark()

    async def _begun(self) -> ProgressWriter:
        if self._writer is None:
            run = self._run
            task, since = run.opened.asks.digest, max(1, run.log.redriven)
            self._writer = ProgressWriter(self._desk, run.log.ref, task, run.record.epoch, since=since)
            if self._over:
                await self._writer.finish()  # what its handler has left running tells nothing any more
        return self._writer
