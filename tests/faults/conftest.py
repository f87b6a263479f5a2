"""A real stack, and a callee and a caller on it that live through all faults of a module."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.faults.stage import Stage
from tests.integration.fixtures import *  # noqa: F403
from tests.integration.fixtures import _tests_own_logging_and_signals  # noqa: F401
from tests.integration.probes import Probe
from tests.integration.world import Caller, World


@pytest.fixture(scope="module")
async def stage(session_world: World) -> AsyncIterator[Stage]:
    yield Stage(session_world)
    await session_world.clear()


@pytest.fixture
async def world(stage: Stage, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """The stack, in order again after each test. Who does not ask for ``echo`` may be it."""
    if "echo" not in request.fixturenames:
        await stage.without_echo()
    yield stage.world
    await stage.tidy()


@pytest.fixture
async def echo(stage: Stage, world: World) -> Probe:
    return await stage.echo()


@pytest.fixture
async def cli(stage: Stage, world: World) -> Caller:
    return await stage.cli()
