"""Workers that die, hang, leak or can't start, under ``agentweave supervise``: what was asked for is done."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentweave_bus import TaskHandle
from tests.integration.probes import CLI, ECHO, PATIENCE
from tests.integration.supervision import START_S, all_ready, pids, supervision
from tests.integration.world import Caller, World

pytestmark = [pytest.mark.anyio, pytest.mark.slow]  # each starts several workers

FAULTY = """
import asyncio, os, time
from agentweave_bus import SecureAgent, capability

kept = []

def note(file: str, text: str) -> None:
    with open(file, "a") as log:
        log.write(f"{text}\\n")

class Worker(SecureAgent):
    @capability("say", safe=True)
    async def say(self, text: str) -> dict:
        return {"pid": os.getpid()}

    @capability("wait")
    async def wait(self, mark: str, until: str) -> dict:
        note(mark, str(os.getpid()))
        while not os.path.exists(until):
            await asyncio.sleep(0.01)
        return {"pid": os.getpid()}

    @capability("freeze")
    async def freeze(self, mark: str) -> dict:
        first = not os.path.exists(mark)
        note(mark, str(os.getpid()))
        if first:
            time.sleep(120)
        return {"pid": os.getpid()}

    @capability("leak", safe=True)
    async def leak(self, megabytes: int) -> dict:
        kept.append(os.urandom(megabytes * 2**20))
        return {"pid": os.getpid()}

    @capability("brief")
    async def brief(self, log: str, number: int) -> dict:
        note(log, f"begun {number}")
        await asyncio.sleep(0.4)
        note(log, f"ended {number}")
        return {"number": number}

class Broken(SecureAgent):
    async def on_start(self) -> None:
        raise RuntimeError("no database")
"""
HEALTH = {"beat": 0.2, "silent": 1.5}
RESTART = {"first": 0.05}


async def when(found: Callable[[], bool]) -> None:
    """Wait for what other processes do."""
    with anyio.fail_after(START_S):
        while not found():  # noqa: ASYNC110 - another process
            await anyio.sleep(0.02)


def lines(file: Path) -> list[str]:
    return file.read_text().split("\n")[:-1] if file.exists() else []


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def submitted(cli: Caller, name: str, **payload: Any) -> TaskHandle:
    return await cli.client.submit(str(ECHO), name, payload)


async def pid_of(handle: TaskHandle) -> int:
    result = await handle.result(START_S)
    assert result.status == "completed", result
    return int(result.messages[0].parts[0].data["pid"])


async def calling(cli: Caller, until: Callable[[], Awaitable[bool]]) -> set[int]:
    """Call without a pause, of which no call may fail, until something is so; return whoever answered."""
    answered: set[int] = set()
    async with anyio.create_task_group() as group:

        async def keep_calling() -> None:
            while True:
                answered.add((await cli.ask(ECHO, "say", {"text": "x"}))["pid"])

        for _ in range(4):
            group.start_soon(keep_calling)
        with anyio.fail_after(START_S):
            while not await until():  # noqa: ASYNC110 - another process
                await anyio.sleep(0.05)
        group.cancel_scope.cancel()
    return answered


async def test_what_one_did_that_was_killed_or_hangs_is_finished_by_another(
    world: World, tmp_path: Path
) -> None:
    cli = await world.client(CLI)
    entry = {"replicas": 2, "health": HEALTH, "restart": RESTART}
    async with supervision(world, tmp_path, entry, FAULTY, bus__task_ack_wait=2.0) as one:
        await one.ready()
        mark, until = tmp_path / "mark", tmp_path / "until"
        handle = await submitted(cli, "wait", mark=str(mark), until=str(until))
        await when(lambda: len(lines(mark)) == 1)
        killed = int(lines(mark)[0])
        os.kill(killed, signal.SIGKILL)
        until.touch()
        assert await pid_of(handle) != killed
        await one.until(lambda now: all_ready(now) and killed not in pids(now))

        handle = await submitted(cli, "freeze", mark=str(tmp_path / "froze"))
        await when(lambda: len(lines(tmp_path / "froze")) == 1)
        frozen = int(lines(tmp_path / "froze")[0])
        assert await pid_of(handle) != frozen
        await one.until(lambda now: all_ready(now) and frozen not in pids(now))
        assert "is killed: it has said nothing for 2 s: its event loop hangs" in one.log

        left = pids(await one.workers())
        one.process.kill()
        died = time.monotonic()
        await when(lambda: not any(map(lives, left)))
        assert time.monotonic() - died < 2


async def test_one_that_leaks_is_replaced_and_no_call_fails(world: World, tmp_path: Path) -> None:
    cli = await world.client(CLI)
    entry = {"health": HEALTH, "recycle": {"memory_mb": 250}}
    async with supervision(world, tmp_path, entry, FAULTY) as one:
        await one.ready()
        (before,) = pids(await one.until(all_ready))

        async def has_gone() -> bool:
            if "is replaced" not in one.log:
                await cli.ask(ECHO, "leak", {"megabytes": 20})
            return not lives(before)

        answered = await calling(cli, has_gone)
        assert answered == {before, *pids(await one.workers())}
        assert "is replaced by a fresh worker: it uses 2" in one.log
        assert "is started again" not in one.log


async def test_one_that_can_not_start_is_given_up_with_its_own_words(world: World, tmp_path: Path) -> None:
    entry = {"class": "live_agents:Broken", "restart": {"first": 0.2, "limit": 2}}
    async with supervision(world, tmp_path, entry, FAULTY) as one:
        async with asyncio.timeout(START_S):
            assert await one.process.wait() == 1
        pauses = [
            line.rpartition(" in ")[2] for line in one.log.split("\n") if "it is started again in" in line
        ]
        assert [0.1 <= float(pause.split()[0]) <= 0.6 for pause in pauses] == [True, True]
        assert "it is not started again: it ended 3 times and never ran for 60 s" in one.log
        assert one.log.count("RuntimeError: no database") >= 3
        assert "no worker is left" in one.log


async def test_there_are_more_workers_under_a_backlog_and_fewer_after_it(
    world: World, tmp_path: Path
) -> None:
    cli = await world.client(CLI)
    entry = {
        "min": 1, "max": 3, "scale": {"backlog": 4, "cool_down": 1.0}, "concurrency": 2, "health": HEALTH,
    }  # fmt: skip
    mark, until = tmp_path / "mark", tmp_path / "until"
    async with supervision(world, tmp_path, entry, FAULTY) as one:
        await one.ready()
        handles = [await submitted(cli, "wait", mark=str(mark), until=str(until)) for _ in range(24)]
        await one.until(lambda now: len(now) == 3 and all_ready(now))
        (agent,) = (await one.ask("status"))["agents"]
        assert (agent["min"], agent["max"], agent["wanted"]) == (1, 3, 3)
        assert agent["backlog"] >= 12
        await when(lambda: len(lines(mark)) == 6)  # two at a time each
        until.touch()
        workers = {await pid_of(handle) for handle in handles}
        assert len(workers) == 3
        await one.until(lambda now: len(now) == 1)
        assert re.search(r"echo: 2 workers instead of 1: \d+ tasks wait", one.log)
        assert "echo: 1 worker instead of 2: 0 tasks wait, 0 requests are worked on" in one.log
        await when(lambda: sum(map(lives, workers)) == 1)
        assert await one.end() == 0


async def test_told_to_end_under_load_no_handler_is_cut_and_nothing_is_lost(
    world: World, tmp_path: Path
) -> None:
    cli = await world.client(CLI)
    entry = {"replicas": 2, "concurrency": 4, "drain_timeout": 20}
    log = tmp_path / "handled"
    async with supervision(world, tmp_path, entry, FAULTY) as one:
        await one.ready()
        handles = [await submitted(cli, "brief", log=str(log), number=number) for number in range(60)]
        await when(lambda: len([line for line in lines(log) if line.startswith("ended")]) >= 8)
        assert await one.end() == 0
        begun = {line.split()[1] for line in lines(log) if line.startswith("begun")}
        assert begun == {line.split()[1] for line in lines(log) if line.startswith("ended")}
        assert 8 <= len(begun) < 60
    async with supervision(world, tmp_path, entry, FAULTY) as one:
        await one.ready()
        with anyio.fail_after(START_S):
            assert [(await handle.result(PATIENCE)).status for handle in handles] == ["completed"] * 60
        assert await one.end() == 0
    assert set(Counter(lines(log)).values()) == {1}


async def test_two_supervisors_share_the_work_and_one_that_is_lost_leaves_it_to_the_other(
    world: World, tmp_path: Path
) -> None:
    """As on two machines: they know nothing of each other but what the broker gives to both."""
    cli = await world.client(CLI)
    log, folders = tmp_path / "handled", [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    entry = {"replicas": 2, "concurrency": 2, "restart": RESTART}
    lasting = {"bus__task_ack_wait": 2.0}
    async with (
        supervision(world, folders[0], entry, FAULTY, **lasting) as one,
        supervision(world, folders[1], entry, FAULTY, **lasting) as other,
    ):
        await one.ready()
        await other.ready()
        mine, theirs = pids(await one.until(all_ready)), pids(await other.until(all_ready))
        handles = [await submitted(cli, "brief", log=str(log), number=number) for number in range(60)]
        await when(lambda: len([line for line in lines(log) if line.startswith("ended")]) >= 8)
        mark, until = tmp_path / "mark", tmp_path / "until"
        held = [
            await submitted(cli, "wait", mark=str(mark), until=str(until)) for _ in range(8)
        ]  # two for each worker
        await when(lambda: {int(line) for line in lines(mark)} == mine | theirs)
        one.process.kill()
        await when(lambda: not any(map(lives, mine)))
        until.touch()
        assert {await pid_of(handle) for handle in held} <= theirs
        with anyio.fail_after(START_S):
            assert [(await handle.result(PATIENCE)).status for handle in handles] == ["completed"] * 60
        assert (await cli.ask(ECHO, "say", {"text": "x"}))["pid"] in theirs
        assert await other.end() == 0
