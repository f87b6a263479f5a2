"""``agentweave supervise`` keeps real workers of a real bus running, whatever happens to them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from tests.integration.probes import CLI, ECHO, PATIENCE
from tests.integration.supervision import START_S, all_ready, pids, scraped, supervision
from tests.integration.world import World

pytestmark = pytest.mark.anyio


@pytest.mark.slow  # it starts ten workers
async def test_through_its_life(world: World, tmp_path: Path) -> None:
    """Ready, beats, a kill, scaling, rolling under load with no failed call, a drain, the end in order."""
    entry = {"replicas": 2, "health": {"beat": 0.2}, "restart": {"first": 0.05}, "env": {"LIVE": "yes"}}
    cli = await world.client(CLI)
    async with supervision(world, tmp_path, entry) as one:
        told = await one.ready()
        assert [worker["name"] for worker in told["workers"]] == ["echo/1", "echo/2"]
        assert oct(one.socket.stat().st_mode)[-3:] == "600"
        workers = await one.until(all_ready)
        beat = workers[0]["beat"]
        assert (beat["connected"], beat["svid_s"] > 60, beat["resident"] > 20 * 2**20) == (True, True, True)
        assert beat["idle_s"] < 60

        os.kill(workers[0]["pid"], signal.SIGKILL)
        after = await one.until(lambda now: all_ready(now) and pids(now) != pids(workers))
        assert [worker["restarts"] for worker in after] == [1, 0]
        assert "echo/1 was ended by SIGKILL; it is started again in" in one.log

        calls: list[int] = []
        async with anyio.create_task_group() as group:

            async def keep_calling() -> None:
                while True:
                    calls.append((await cli.ask(ECHO, "say", {"text": "x"}))["pid"])

            group.start_soon(keep_calling)
            one.process.send_signal(signal.SIGHUP)
            rolled = await one.until(lambda now: all_ready(now) and not pids(now) & pids(after))
            await one.ask("scale", agent="echo", replicas=3)
            await one.until(lambda now: len(now) == 3 and all_ready(now))
            group.cancel_scope.cancel()
        assert set(calls) & pids(after)
        assert set(calls) & pids(rolled)

        text = await anyio.to_thread.run_sync(scraped, told["metrics"])
        assert 'agentweave_workers{agent="echo",state="ready"} 3.0' in text
        assert 'agentweave_worker_restarts_total{agent="echo"} 3.0' in text

        await one.ask("drain", agent="echo")
        assert await one.until(lambda now: {worker["state"] for worker in now} == {"drained"})
        text = await anyio.to_thread.run_sync(scraped, told["metrics"])
        said = re.search(
            r'agentweave_requests_total{agent="echo",capability="say",.*status="success"} (.*)', text
        )
        assert said is not None  # of all that were ever there; the last call was given up by its caller
        assert float(said[1]) in {len(calls), len(calls) + 1}
        await one.ask("restart", agent="echo")
        last = await one.until(all_ready)
        assert await one.end() == 0
        assert not one.socket.exists()
        for pid in pids(last):
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


async def test_what_is_being_done_is_finished_before_it_ends(world: World, tmp_path: Path) -> None:
    cli = await world.client(CLI)
    mark, until = tmp_path / "mark", tmp_path / "until"
    async with supervision(world, tmp_path, {"drain_timeout": 20}) as one:
        await one.ready()
        async with anyio.create_task_group() as group:
            answers: list[Any] = []

            async def ask() -> None:
                answers.append(await cli.ask(ECHO, "wait", {"mark": str(mark), "until": str(until)}))

            group.start_soon(ask)
            with anyio.fail_after(PATIENCE):
                while not mark.exists():  # noqa: ASYNC110 - another process
                    await anyio.sleep(0.02)
            one.process.send_signal(signal.SIGTERM)
            with anyio.fail_after(PATIENCE):
                while "stopping on SIGTERM" not in one.log:  # noqa: ASYNC110 - another process
                    await anyio.sleep(0.02)
            until.touch()
        assert answers[0]["waited"] is True
        assert await one.end() == 0


@pytest.mark.slow  # it starts three supervisors
async def test_a_wrong_configuration_and_a_second_supervisor(world: World, tmp_path: Path) -> None:
    async with supervision(world, tmp_path, {"class": "live_agents:Nobody"}) as one:
        async with asyncio.timeout(START_S):
            assert await one.process.wait() == 1
        assert re.search(r"echo ended with exit code 2.*its configuration is wrong", one.log)
        assert "live_agents has no 'Nobody'" in one.log
        assert "no worker is left" in one.log
    async with supervision(world, tmp_path, {"health": {"beat": 0.2}}) as one:
        await one.ready()
        async with supervision(world, tmp_path, {}) as second, asyncio.timeout(START_S):
            assert await second.process.wait() == 2
            assert "Another supervisor is at" in second.log
        (tmp_path / "stack.yaml").write_text("agents: 7")
        before = await one.until(all_ready)
        one.process.send_signal(signal.SIGHUP)
        with anyio.fail_after(PATIENCE):
            while "everything stays as it was" not in (tmp_path / "log").read_text():  # noqa: ASYNC110
                await anyio.sleep(0.02)
        assert pids(await one.workers()) == pids(before)
