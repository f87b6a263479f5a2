"""One bus in memory for all tests of a module; each test has a task of its own. Import both fixtures."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from agentweave_bus.envelope import new_id
from agentweave_bus.testing import MemoryBus
from tests.unit.tasks.conftest import QuietAgent, World

__all__ = ["module_world", "world"]


@pytest.fixture(scope="module")
async def module_world(anyio_backend: str) -> AsyncIterator[World]:
    """An agent, a client, and another client that is granted the same."""
    made = MemoryBus()
    try:
        await made.grant("client/cli", "agent/quiet", "work")
        await made.grant("client/mallory", "agent/quiet", "work")
        await made.start(QuietAgent)
        await made.client("client/cli")
        await made.client("client/mallory")
        parts = [one.parts for one in made._held]
        yield World(made, dict(zip(("agent", "client", "mallory"), parts, strict=True)))  # type: ignore[arg-type]
    finally:
        await made.aclose()


@pytest.fixture
def world(module_world: World) -> World:
    """The same, with a task of which nothing is recorded."""
    return World(module_world.bus, module_world.parts, new_id(module_world.desk("agent").clock_ms()))


def foreign(world: World, who: str = "client") -> float:
    """How many slots somebody has passed over so far."""
    registry = world.parts[who].metrics.registry
    return registry.get_sample_value("agentweave_foreign_records_total") or 0.0
