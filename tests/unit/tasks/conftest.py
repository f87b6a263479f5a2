"""An agent and a client on the bus in memory, and what they need to read and write logs of tasks."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from agentweave_bus import SecureAgent, capability
from agentweave_bus.envelope import new_id
from agentweave_bus.runtime.wiring import Connected
from agentweave_bus.tasks.log import Desk, TaskLog
from agentweave_bus.tasks.record import RecordBody, TaskRef
from agentweave_bus.testing import MemoryBus
from agentweave_bus.types import TaskState

PD = "ab" * 32
TASK = b"\x07" * 32


class QuietAgent(SecureAgent):
    """Its queue exists; nobody asks it for anything here."""

    @capability("work")
    async def work(self) -> None:
        """Do nothing."""


def body(state: TaskState, **more: object) -> RecordBody:
    """Return what a record of ``state`` says."""
    return RecordBody(state=state, pd=PD, **more)


@dataclass
class World:
    """Everybody's parts. ``log`` is a new view of the one task's log, as somebody sees it."""

    bus: MemoryBus
    parts: dict[str, Connected] = field(default_factory=dict)
    task_id: str = ""

    def desk(self, who: str) -> Desk:
        return self.parts[who].desk

    @property
    def ref(self) -> TaskRef:
        return TaskRef(self.bus.id("agent/quiet"), self.bus.id("client/cli"), "work", self.task_id)

    def log(self, who: str = "agent") -> TaskLog:
        return TaskLog(self.desk(who), self.ref)


@pytest.fixture
async def world(bus: MemoryBus) -> World:
    world = World(bus, task_id=new_id(bus.clock.time_ns() // 1_000_000))
    await bus.grant("client/cli", "agent/quiet", "work")
    await bus.grant("client/mallory", "agent/quiet", "work")
    await bus.start(QuietAgent)
    await bus.client("client/cli")
    await bus.client("client/mallory")
    for name, held in zip(("agent", "client", "mallory"), bus._held, strict=True):
        assert held.parts is not None
        world.parts[name] = held.parts
    return world
