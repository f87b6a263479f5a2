"""``/readyz`` of a worker says what it can't do, and why, through real failures; and takes that back after."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import anyio
import anyio.to_thread
import pytest

from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.bus import connection
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.config import AgentConfig
from agentweave_bus.runtime import loop_lag, readiness
from agentweave_bus.tasks.task_puller import TaskPuller
from tests.integration.connections import Fixed, until
from tests.integration.opa_server import OpaServer
from tests.integration.own_brokers import free_ports
from tests.integration.probes import CLI, ECHO, PATIENCE, Probe
from tests.integration.scraping import fetched, samples
from tests.integration.test_opa_faults import BROKEN, denial, players  # noqa: F401 - a fixture
from tests.integration.test_opa_faults import asks as player_asks
from tests.integration.test_opa_servers import asks, folder, opa  # noqa: F401 - fixtures
from tests.integration.world import Caller, World, metric

pytestmark = pytest.mark.anyio


class Watched:
    """An agent in this process, and what its listener says."""

    def __init__(self, agent: Any, port: int) -> None:
        self.agent = agent
        self.root = f"http://127.0.0.1:{port}"

    async def ready(self) -> tuple[int, dict[str, Any]]:
        status, text = await anyio.to_thread.run_sync(fetched, f"{self.root}/readyz")
        return status, json.loads(text)

    async def until(self, wanted: int) -> dict[str, Any]:
        with anyio.fail_after(PATIENCE):
            while True:
                status, told = await self.ready()
                if status == wanted:
                    return told
                await anyio.sleep(0.02)

    async def shown(self) -> dict[str, float]:
        """Return ``agentweave_ready`` by part."""
        _, text = await anyio.to_thread.run_sync(fetched, f"{self.root}/metrics")
        return {one.labels["part"]: one.value for one in samples(text) if one.name == "agentweave_ready"}


async def watched(world: World, **options: Any) -> Watched:
    (port,) = free_ports(1)
    agent = await world.agent(ECHO, observability__metrics={"enabled": True, "port": port}, **options)
    return Watched(agent, port)


def is_unready(told: dict[str, Any], **why: str) -> bool:
    """Say whether exactly these parts are not well, for these reasons."""
    parts = ("connected", "identity", "subscribed", "receiving", "policy")
    return told["ok"] is False and told["why"] == why and all(told[one] is (one not in why) for one in parts)


async def test_an_identity_that_ran_out_and_came_back(world: World) -> None:
    provider = Fixed(world.issue(ECHO), world.stack.api.authority.bundle)
    one = await watched(world, provider=provider)
    status, told = await one.ready()
    assert (status, told["ok"], "why" in told) == (200, True, False)
    assert set((await one.shown()).values()) == {1.0}
    provider.replace(world.issue(ECHO, lifetime=timedelta(seconds=1)))
    told = await one.until(503)
    assert is_unready(told, identity="there is no valid SVID")
    assert (await one.shown())["identity"] == 0
    provider.replace(world.issue(ECHO))
    await one.until(200)


class Slow(Probe):
    """Starts when its test says so."""

    def __init__(self, config: AgentConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.may_start.clear()


async def test_an_agent_that_has_not_started_yet(world: World) -> None:
    (port,) = free_ports(1)
    running = await world.start(ECHO, Slow, observability__metrics={"enabled": True, "port": port})
    one = Watched(running.agent, port)
    with anyio.fail_after(PATIENCE):
        while True:
            with suppress(OSError):  # not even its listener is there
                _, told = await one.ready()
                break
            await anyio.sleep(0.02)
    assert is_unready(told, receiving="the agent has not started yet")
    running.agent.may_start.set()
    await one.until(200)


async def test_a_broker_that_went_away(world: World) -> None:
    one = await watched(world)
    await world.stack.nats.kill()
    told = await one.until(503)
    gone = "there is no connection to the broker"
    assert is_unready(told, connected=gone, subscribed="some calls do not get here", receiving=gone)
    await world.stack.nats.start()
    await one.until(200)


async def test_a_subscription_that_the_broker_took_back_and_gives_again(
    world: World, cli: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is connected and well in its own eyes, and no call gets there any more, until it connects anew."""
    monkeypatch.setattr(connection, "_RENEW_FIRST_S", 0.5)
    one = await watched(world)
    nats = world.stack.nats
    before = nats._config
    changed = json.loads(before)
    (user,) = [each for each in changed["authorization"]["users"] if each["user"] == str(ECHO)]
    calls = call_subject(ECHO, "say").rpartition(".")[0]
    allowed = user["permissions"]["subscribe"]["allow"]
    kept = [subject for subject in allowed if not subject.startswith(calls)]
    assert len(kept) < len(allowed)
    user["permissions"]["subscribe"]["allow"] = kept
    await nats.reload(json.dumps(changed))
    try:
        told = await one.until(503)
        assert is_unready(told, subscribed="some calls do not get here")
        assert one.agent.parts.keeper.connected
        renewed = metric(one.agent.parts, "agentweave_bus_reconnects_total")
        await until(lambda: metric(one.agent.parts, "agentweave_bus_reconnects_total") > renewed, "a renewal")
        assert is_unready((await one.ready())[1], subscribed="some calls do not get here")
    finally:
        await nats.reload(before)
    await one.until(200)
    assert await cli.ask(ECHO, "say", {"text": "again"}) == {"said": "again"}


@pytest.mark.skipif(find_opa() is None, reason="no opa binary: 'make tools' builds the server to ask")
async def test_a_policy_server_that_went_away(world: World, opa: OpaServer) -> None:  # noqa: F811 - the fixture
    await opa.start({"grants": [{"caller": str(CLI), "callee": str(ECHO), "capabilities": ["say"]}]})
    one = await watched(world, **asks(opa))
    told = await one.until(200)
    assert told["policy"] is True
    await opa.stop()
    told = await one.until(503)
    assert is_unready(told, policy="the policy gives no answer")
    assert opa.url not in json.dumps(told)
    await opa.start()
    await one.until(200)


async def test_a_policy_server_that_answers_nonsense(world: World, cli: Caller, players: Any) -> None:  # noqa: F811
    """Its breaker opens. It is seen to close in time also where nobody asks any more."""
    first, _ = players
    breaker = {"failure_threshold": 1, "success_threshold": 1, "timeout": 0.5}
    one = await watched(world, **player_asks(first, **breaker))
    await one.until(200)
    first.play = BROKEN
    await denial(cli)
    told = await one.until(503)
    assert is_unready(told, policy="the policy gives no answer")
    await one.until(200)


async def test_a_worker_that_is_deaf_to_its_queues(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    pullers: list[TaskPuller] = []
    run = TaskPuller.run

    async def noted(self: TaskPuller) -> None:
        pullers.append(self)
        await run(self)

    monkeypatch.setattr(TaskPuller, "run", noted)
    one = await watched(world)
    await one.until(200)
    with monkeypatch.context() as patch:

        async def asks_nothing(*_: Any) -> None: ...

        patch.setattr(TaskPuller, "_ask", asks_nothing)
        pullers[0]._asked_at -= readiness.DEAF_S + 5
        told = await one.until(503)
        assert is_unready(told, receiving="no task was asked for in a minute although there is room")
    pullers[0]._queues[0].over()
    pullers[0]._changed.set()
    await one.until(200)


async def test_an_event_loop_that_is_stuck(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listener answers all the same, and says so."""
    monkeypatch.setattr(readiness, "STUCK_S", 0.3)
    monkeypatch.setattr(loop_lag, "_EVERY_S", 0.1)
    one = await watched(world)
    await one.until(200)
    seen: list[Any] = []

    def look() -> None:
        seen.append(fetched(f"{one.root}/readyz"))
        seen.append(fetched(f"{one.root}/metrics"))

    watcher = threading.Timer(0.7, look)
    watcher.start()
    time.sleep(1.2)  # noqa: ASYNC251 - that is the point
    await anyio.to_thread.run_sync(watcher.join)
    (status, told), (_, text) = seen
    assert status == 503
    assert is_unready(json.loads(told), receiving="the event loop is stuck")
    (late,) = [each.value for each in samples(text) if each.name == "agentweave_event_loop_lag_seconds"]
    assert late > 0.3
    await one.until(200)
