"""What the composition root promises beside calls that work."""

from __future__ import annotations

import logging
import ssl

import pytest

from agentweave_bus.bus import connection
from tests.integration.probes import CLI, ECHO

pytestmark = pytest.mark.anyio


async def test_the_bus_speaks_tls_1_3_whatever_is_configured(world, monkeypatch):
    made = []
    real = connection.client_context

    def noted(*args, **named):
        made.append(real(*args, **named))
        return made[-1]

    monkeypatch.setattr(connection, "client_context", noted)
    monkeypatch.setenv("AGENTWEAVE_ENV", "development")
    config = world.config(CLI)
    older = config.transport.model_copy(update={"tls_min_version": "1.2"})
    config = config.model_copy(update={"transport": older})
    monkeypatch.setattr(world, "config", lambda *_a, **_k: config)
    await world.client(CLI)
    assert [one.minimum_version for one in made] == [ssl.TLSVersion.TLSv1_3]


async def test_logging_of_the_program_around_an_agent_is_left_as_it_was(world):
    root, loop = logging.getLogger(), logging.getLogger("asyncio")
    handlers, filters = list(root.handlers), list(loop.filters)
    await world.agent(ECHO)
    assert root.handlers == handlers
    await world.client(CLI)
    # The stack's control role is connected in this process, so the one filter is there before and after.
    assert loop.filters == filters
    assert len(filters) == 1
    await world.clear()
    assert loop.filters == filters


async def test_a_grant_of_everything_makes_no_series_of_its_own(world):
    cli = await world.client(CLI)
    names = {
        sample.labels.get("capability")
        for one in cli.parts.metrics.registry.collect()
        for sample in one.samples
    }
    assert "relay" in names
    assert "*" not in names
