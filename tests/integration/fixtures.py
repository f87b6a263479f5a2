"""Fixtures over a live world, for every suite that needs a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import pytest

from agentweave_bus.runtime import lifecycle
from tests.integration.connections import Raw
from tests.integration.probes import CLI, ECHO, Probe, stop_asked_for
from tests.integration.world import Caller, World


@pytest.fixture(autouse=True, scope="session")
def _tests_own_logging_and_signals() -> Any:
    """Agents run inside of the test process, whose signals are pytest's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifecycle, "stop_signals", lambda: nullcontext(stop_asked_for))
        yield


@pytest.fixture(scope="session")
async def session_world(tmp_path_factory: Any, anyio_backend: str) -> AsyncIterator[World]:
    """One stack for all tests that leave its grants alone."""
    async with World.make(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture
async def world(session_world: World) -> AsyncIterator[World]:
    """The stack, and what a test starts on it is stopped after the test."""
    yield session_world
    await session_world.stack.nats.start()
    await session_world.clear()


@pytest.fixture
async def echo(world: World) -> Probe:
    return await world.agent(ECHO)


@pytest.fixture
async def cli(world: World) -> Caller:
    return await world.client(CLI)


@pytest.fixture
async def mallory(world: World) -> Raw:
    """Somebody who owns the broker: may publish and hear anything, but has no key but his own."""
    return await world.raw()
