"""Peers that ask too much, read nothing or never answer. Memory stays bounded, and others are served."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import anyio
import pytest

from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.exceptions import (
    AuthorizationError,
    CallRefusedError,
    CallTimeoutError,
    NoResponderError,
)
from tests.faults.proxy import proxied
from tests.faults.stage import answered
from tests.faults.test_stopped_peer import stopped
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, FRONT, GRANTS, OTHER, PATIENCE
from tests.integration.processes import worker_process

pytestmark = pytest.mark.anyio

_log = logging.getLogger(__name__)

MB = 1_000_000


def resident(pid):
    """Bytes of memory that a process has now."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no VmRSS of {pid}")


async def test_handlers_that_never_end_are_ended_at_their_deadlines_and_leave_nothing(cli, echo):
    """Caller and callee each see to it. Whose word comes first is chance; both are clear."""
    ended = []

    async def ask():
        began = time.monotonic()
        try:
            result = await cli.call(str(ECHO), "wait", timeout=0.3)
        except CallTimeoutError as error:
            ended.append((time.monotonic() - began, str(error)))
        else:
            ended.append((time.monotonic() - began, result.error))

    async with anyio.create_task_group() as group:
        for _ in range(300):  # more than may run at once
            group.start_soon(ask)
    assert len(ended) == 300
    assert max(seconds for seconds, _ in ended) < 20
    assert all(word.startswith(("no answer from", "deadline exceeded")) for _, word in ended)
    await until(lambda: echo._at_once == 0, "the end of the handlers")
    assert not echo.gate.is_set()
    cli.parts.client.breakers._breakers.clear()
    assert await cli.ask(ECHO, "say", {"text": "x"})
    assert cli.parts.client.transport._calls == {}
    session = await echo.parts.keeper.session(1)
    await until(lambda: session.in_flight == 0, "idleness")


async def test_many_answers_of_almost_the_greatest_size_arrive_whole(cli, echo):
    sizes = []

    async def ask():
        sizes.append(len((await cli.ask(ECHO, "huge", {"size": 780_000}))["text"]))

    async with anyio.create_task_group() as group:
        for _ in range(30):
            group.start_soon(ask)
    assert sizes == [780_000] * 30


@pytest.mark.slow
async def test_an_agent_that_falls_behind_drops_what_does_not_fit_and_says_so(world, cli, caplog):
    """Every place is taken, so that messages pile up in the connection: no more than 64 MB of them."""
    echo = await world.agent(ECHO, bus__max_in_flight=1)
    front, mallory = await world.client(FRONT), await world.raw()
    async with anyio.create_task_group() as group:
        for caller in (cli, cli, front, front):
            group.start_soon(caller.ask, ECHO, "wait")
        session = await echo.parts.keeper.session(1)
        await until(lambda: session.in_flight == 4, "four taken in: all that it takes")
        (pile,) = [one for one in session._serving if one.subject == call_subject(ECHO, "say")]
        for sent in range(1, 91):
            await mallory.send(pile.subject, b"\xff" * 900_000)
            await until(
                lambda sent=sent: pile.pending_msgs >= sent - 1 or "slow consumer" in caplog.text,
                "its arrival",
            )
        assert "slow consumer" in caplog.text
        assert pile.pending_bytes <= 64 * 1024 * 1024
        echo.gate.set()
    assert await cli.ask(ECHO, "say", {"text": "after all that"})
    assert echo.ran == ["wait"] * 4 + ["say"]
    assert pile.pending_bytes == 0


@pytest.fixture
async def other(world):
    """A second caller, with a grant of its own."""
    given = {"caller": str(OTHER), "callee": [str(ECHO)], "capabilities": ["say"]}
    world.grant({"grants": [*GRANTS["grants"], given]})
    yield await world.client(OTHER)
    world.grant(GRANTS)


async def until_granted(other):
    with anyio.fail_after(PATIENCE):
        while True:
            try:
                return await other.ask(ECHO, "say", {"text": "me"})
            except (AuthorizationError, NoResponderError):
                await anyio.sleep(0.05)


@pytest.mark.slow
async def test_thousands_of_calls_of_one_caller_leave_room_for_another(world, other, tmp_path):
    greedy = await world.client(CLI, bus__retry={"attempts": 1}, bus__max_pending_calls=4096)
    refused, done = [], []
    until_file = tmp_path / "go"

    async def ask():
        try:
            done.append(
                await greedy.ask(
                    ECHO, "wait", {"mark": str(tmp_path / "mark"), "until": str(until_file)}, timeout=60
                )
            )
        except CallRefusedError as error:
            refused.append(error)

    async with worker_process(world, ECHO) as worker:
        await until_granted(other)
        before = resident(worker.process.pid)
        async with anyio.create_task_group() as group:
            for _ in range(3000):
                group.start_soon(ask)
            await until(lambda: len(refused) >= 3000 - 512, "those who are told to come again")
            times = []
            for _ in range(50):
                began = time.monotonic()
                assert await other.ask(ECHO, "say", {"text": "me"})
                times.append(time.monotonic() - began)
            after = resident(worker.process.pid)
            until_file.touch()
        assert (len(done), len(refused)) == (512, 3000 - 512)
        assert {one.step for one in refused} == {"room"}
        assert sorted(times)[25] < 5
        assert after - before < 60 * MB, f"{before / MB:.0f} -> {after / MB:.0f} MB"
        _log.info("the other caller's median, ms: %s", sorted(times)[25] * 1000)
        _log.info("memory of the worker, MB: %s", (before // MB, after // MB))


@pytest.mark.slow
async def test_calls_of_many_bytes_are_refused_as_busy_and_none_is_lost(world):
    """Of 8 MiB a caller has half: five calls of 700 kB. All others hear that the agent is busy, at once."""
    refused, done = [], []
    greedy = await world.client(CLI, bus__retry={"attempts": 1})

    async def ask():
        try:
            done.append(await greedy.ask(ECHO, "say", {"text": "x" * 700_000}))
        except CallRefusedError as error:
            refused.append(error)

    async with worker_process(world, ECHO, bus__max_in_flight_bytes=8 * 1024 * 1024) as worker:
        await answered(greedy)
        before = resident(worker.process.pid)
        async with anyio.create_task_group() as group:
            for _ in range(120):
                group.start_soon(ask)
        after = resident(worker.process.pid)
    _log.info("memory of the worker, MB: %s", (before // MB, after // MB))
    assert len(done) + len(refused) == 120
    assert len(done) >= 5
    assert len(refused) > 30
    assert {one.step for one in refused} == {"room"}
    assert after - before < 200 * MB


@pytest.mark.slow
async def test_a_caller_that_never_reads_its_answers_costs_others_nothing_and_memory_a_bounded_amount(
    world, other
):
    text = "x" * 700_000
    async with proxied(world.stack.nats.port) as network, worker_process(world, ECHO) as worker:
        breaker = {"failure_threshold": 5, "success_threshold": 1, "timeout": 0.3}
        deaf = await world.client(CLI, bus__servers=[network.url], bus__circuit_breaker=breaker)
        await deaf.ask(ECHO, "say", {"text": "x"})
        await until_granted(other)
        before = resident(worker.process.pid), resident(world.stack.nats.pid)
        network.down.hold()
        failures = []

        async def ask():
            try:
                await deaf.call(str(ECHO), "say", {"text": text}, timeout=6)
            except CallTimeoutError as error:
                failures.append(error)

        async with anyio.create_task_group() as group:
            for _ in range(120):
                group.start_soon(ask)
            for _ in range(100):
                assert await other.ask(ECHO, "say", {"text": "me"})
                await anyio.sleep(0.02)
        after = resident(worker.process.pid), resident(world.stack.nats.pid)
        _log.info("memory of the worker, MB: %s", (before[0] // MB, after[0] // MB))
        _log.info("memory of the broker, MB: %s", (before[1] // MB, after[1] // MB))
        assert after[0] - before[0] < 400 * MB  # each message is there several times: read, decoded, recorded
        assert after[1] - before[1] < 200 * MB
        assert len(failures) == 120
        network.let_go()
        assert (await answered(deaf))["said"] == "there?"


@pytest.mark.slow
async def test_a_stopped_agent_that_is_flooded_is_cut_off_by_the_broker_and_comes_back(world, cli):
    mallory = await world.raw()
    async with worker_process(world, ECHO) as worker:
        assert await cli.ask(ECHO, "say", {"text": "x"})
        before = resident(world.stack.nats.pid)
        with stopped(worker):
            for _ in range(200):
                await mallory.client.publish(call_subject(ECHO, "say"), b"\xff" * 900_000, "")
            await mallory.flush()
            await until(
                lambda: any("Slow Consumer" in line for line in world.stack.nats.log_tail),
                "the broker's word",
            )
            after = resident(world.stack.nats.pid)
            _log.info("memory of the broker, MB: %s", (before // MB, after // MB))
            assert after - before < 200 * MB
        assert (await answered(cli))["said"] == "there?"
        assert resident(worker.process.pid) < 250 * MB
