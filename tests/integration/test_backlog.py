"""How many tasks wait: a worker asks its own consumers, and knows it also while it is busy."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import anyio
import pytest

from agentweave_bus import capability
from agentweave_bus.bus.streams import TASK_ACK_WAIT_S
from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.tasks.backlog import Backlog
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, FRONT, PATIENCE, Probe
from tests.integration.world import World

pytestmark = pytest.mark.anyio


class OneAtATime(Probe):
    @capability("wait", concurrency=1)
    async def wait(self) -> dict[str, Any]:
        """Wait for the test's gate."""
        self.entered.set()
        await self.gate.wait()
        return {"waited": True}


class Watched(NamedTuple):
    backlog: Backlog
    metrics: Metrics


def depth(metrics: Metrics, name: str) -> float | None:
    return metrics.registry.get_sample_value("agentweave_queue_depth", {"capability": name})


@asynccontextmanager
async def watched(world: World) -> AsyncIterator[Watched]:
    """Seven tasks for an agent that does one at a time and is held, and how many it knows to wait."""
    cli = await world.client(CLI)
    agent = await world.agent(ECHO, OneAtATime)
    metrics = Metrics.create()
    backlog = Backlog(ECHO, ["wait", "say", "nowhere"], keeper=agent.parts.keeper, metrics=metrics)
    async with anyio.create_task_group() as group:
        group.start_soon(backlog.watch, 0.05)
        await until(lambda: backlog.waiting == 0, "nothing waits")
        levels = (5, 5, 5, 0, 0, 9, 9)
        tasks = [await cli.client.submit(str(ECHO), "wait", {}, priority=level) for level in levels]
        # One runs. Of each other queue one may have been given out when the place had just been taken.
        await until(lambda: (backlog.waiting or 0) >= 4, "the others wait")
        yield Watched(backlog, metrics)
        agent.gate.set()
        # What was given out when a broker was killed may come again only when its worker is taken for lost.
        with anyio.fail_after(TASK_ACK_WAIT_S + PATIENCE):
            for one in tasks:
                assert (await one.result()).status == "completed"
        await until(lambda: backlog.waiting == 0, "nothing waits any more")
        group.cancel_scope.cancel()


async def test_what_waits_is_known_also_while_all_are_busy(world) -> None:
    async with watched(world) as (backlog, metrics):
        shown = {name: depth(metrics, name) for name in ("wait", "say", "nowhere")}
        assert shown == {"wait": backlog.waiting, "say": 0, "nowhere": 0}


@pytest.mark.slow  # what a killed broker had given out comes again after half a minute
async def test_while_disconnected_nobody_says_what_waits(world) -> None:
    async with watched(world) as (backlog, metrics):
        await world.stack.nats.kill()
        await until(lambda: backlog.waiting is None, "nobody can say")
        assert depth(metrics, "wait") is None
        await world.stack.nats.start()
        await until(lambda: (backlog.waiting or 0) >= 4, "they wait still")


async def test_a_broker_that_does_not_let_it_ask_is_not_asked_again_at_once(world, caplog) -> None:
    front = await world.agent(FRONT)
    backlog = Backlog(ECHO, ["say"], keeper=front.parts.keeper, metrics=Metrics.create())
    with caplog.at_level(logging.WARNING, logger="agentweave_bus.tasks.backlog"), anyio.move_on_after(0.5):
        await backlog.watch(0.02)
    said = [one for one in caplog.records if "how many tasks wait is not known" in one.message]
    assert (len(said), backlog.waiting) == (1, None)
