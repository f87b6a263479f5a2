"""Handles on a real broker: results, watching through a restart of it, cancelling, and the command line."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentweave_bus import SyncAgentWeaveClient, TaskEvent, TaskHandle
from agentweave_bus.cli import main
from agentweave_bus.exceptions import CallTimeoutError, IdempotencyError, TaskCanceledError
from agentweave_bus.tasks import hints
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, PATIENCE
from tests.integration.task_probe import TaskProbe
from tests.integration.world import Caller, World

pytestmark = pytest.mark.anyio

TARGET = str(ECHO)


@pytest.fixture(scope="module")
async def stage(session_world: World) -> AsyncIterator[tuple[World, TaskProbe, Caller]]:
    """One worker and one client for all tests here; each test begins with nothing in the queue."""
    world = session_world
    probe = await world.agent(ECHO, TaskProbe)
    cli = await world.client(CLI)
    assert isinstance(probe, TaskProbe)
    yield world, probe, cli
    await world.clear()


@pytest.fixture
def world(stage: tuple[World, TaskProbe, Caller]) -> World:
    return stage[0]


@pytest.fixture
def probe(stage: tuple[World, TaskProbe, Caller]) -> TaskProbe:
    probe = stage[1]
    probe.ran.clear()
    probe.entered.clear()
    probe.cleaned_up.clear()
    return probe


@pytest.fixture
def cli(stage: tuple[World, TaskProbe, Caller]) -> Caller:
    return stage[2]


async def submit(cli: Caller, name: str = "pieces", payload: Any = None, **options: Any) -> TaskHandle:
    return await cli.client.submit(TARGET, name, {"count": 2} if payload is None else payload, **options)


def brief(events: list[TaskEvent]) -> list[str]:
    return [str(one.state) if one.kind == "state" else one.kind for one in events]


WHOLE = ["working", "artifact", "progress", "artifact", "progress", "completed"]


async def test_a_task_is_waited_for_and_comes_before_the_next_poll(
    cli: Caller, probe: TaskProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints, "_POLL_S", 60.0)
    handle = await submit(cli, "work", {"text": "warm"})
    assert (await handle.result(PATIENCE)).data == {"worked": "warm"}
    handle = await submit(cli, "work", {"text": "now"})
    assert (await handle.result(PATIENCE)).data == {"worked": "now"}


async def test_everything_is_told_once_and_in_order_to_all_who_watch(cli: Caller, probe: TaskProbe) -> None:
    handle = await submit(cli)
    watching = [asyncio.create_task(watched(handle.events())) for _ in range(3)]
    await asyncio.wait_for(probe.entered.wait(), PATIENCE)
    for _ in range(2):
        probe.take_turns(1)
        await asyncio.sleep(0.15)  # so that no progress takes another's place
    async with asyncio.timeout(PATIENCE):
        for events in await asyncio.gather(*watching):
            assert brief(events) == WHOLE
            assert [one.artifact and one.artifact["data"] for one in events][1] == 0
            assert events == await watched(cli.client.task(handle.reference).events())


async def watched(events: AsyncIterator[TaskEvent]) -> list[TaskEvent]:
    return [event async for event in events]


async def test_a_watcher_that_reconnects_sees_every_event_once(
    world: World, cli: Caller, probe: TaskProbe
) -> None:
    handle = await submit(cli)
    seen: list[TaskEvent] = []

    async def watch() -> None:
        async for event in handle.events():
            seen.append(event)  # noqa: PERF401 - one at a time, as they come

    async with asyncio.timeout(4 * PATIENCE):
        watching = asyncio.create_task(watch())
        waiting = asyncio.create_task(handle.result())
        await probe.entered.wait()
        probe.take_turns(1)
        await until(lambda: len(seen) == 3, "the first events")
        await world.stack.nats.kill()
        probe.take_turns(1)
        await asyncio.sleep(0.3)
        await world.stack.nats.start()
        await watching
        assert brief(seen) == WHOLE
        assert (await waiting).data == {"count": 2}
        # Another process goes on where the first one was when it ended.
        other = await world.client(CLI)
        again = other.client.task(handle.reference)
        assert await watched(again.events(after=seen[2].cursor)) == seen[3:]


async def test_cancelling_reaches_a_handler_that_runs(cli: Caller, probe: TaskProbe) -> None:
    handle = await submit(cli)
    await asyncio.wait_for(probe.entered.wait(), PATIENCE)
    began = time.monotonic()
    status = await handle.cancel("not needed", timeout=PATIENCE)
    assert probe.cleaned_up.is_set()
    assert time.monotonic() - began < 20
    assert (status.state, status.message) == ("canceled", "not needed")
    with pytest.raises(TaskCanceledError):
        await handle.result(1)


async def test_cancelling_reaches_a_task_that_waits_for_its_turn(cli: Caller, probe: TaskProbe) -> None:
    first = await submit(cli)
    await asyncio.wait_for(probe.entered.wait(), PATIENCE)
    second = await submit(cli)
    named = cli.client.task(second.reference)
    assert (await named.cancel("changed my mind", timeout=PATIENCE)).state == "canceled"
    probe.take_turns(2)
    assert (await first.result(PATIENCE)).status == "completed"
    third = await submit(cli, payload={"count": 0})  # behind the second in the queue
    assert (await third.result(PATIENCE)).status == "completed"
    assert probe.ran == ["pieces", "pieces"]
    assert (await second.status()).attempt == 0


async def test_a_key_that_is_used_again_has_the_first_outcome(cli: Caller, probe: TaskProbe) -> None:
    first = await submit(cli, "work", {"text": "a"}, idempotency_key="k-1")
    again = await submit(cli, "work", {"text": "a"}, idempotency_key="k-1")
    assert (first.id, (await first.result(PATIENCE)).data) == (again.id, {"worked": "a"})
    assert (await again.result(PATIENCE)).data == {"worked": "a"}
    other = await submit(cli, "work", {"text": "b"}, idempotency_key="k-1")
    with pytest.raises(IdempotencyError):
        await other.result(PATIENCE)
    assert probe.ran == ["work"]


async def test_a_wait_that_ends_leaves_the_task_alone(cli: Caller, probe: TaskProbe) -> None:
    handle = await submit(cli, payload={"count": 1})
    with pytest.raises(CallTimeoutError, match="it goes on"):
        await handle.result(0.3)
    probe.take_turns(1)
    assert (await handle.result(PATIENCE)).data == {"count": 1}


# --- without an event loop, and on the command line -------------------------------------------------------


@pytest.fixture
def client_file(world: World, tmp_path: Path) -> str:
    file = tmp_path / "client.yaml"
    settings = world.settings(CLI)
    settings["authorization"]["audit"]["destination"] = str(tmp_path / "audit" / "cli.jsonl")
    file.write_text(yaml.safe_dump(settings))
    return str(file)


async def test_a_script_watches_and_waits(world: World, probe: TaskProbe, tmp_path: Path) -> None:
    config = world.config(CLI, authorization__audit__destination=str(tmp_path / "audit" / "script.jsonl"))

    def script() -> None:
        with SyncAgentWeaveClient(config) as client:
            handle = client.submit(TARGET, "pieces", {"count": 1})
            assert brief(list(client.task(handle.reference).events())) == [
                *("working", "artifact", "progress", "completed")
            ]
            assert handle.result(PATIENCE).data == {"count": 1}
            assert handle.status().state == "completed"
            for _ in handle.events():
                break  # leaving early leaves nothing behind
            assert handle.cancel().state == "completed"

    probe.take_turns(1)
    await asyncio.to_thread(script)


async def command(
    capsys: pytest.CaptureFixture[str], *words: str, code: int = 0
) -> Any:  # what it printed, as JSON
    capsys.readouterr()
    assert await asyncio.to_thread(main, list(words)) == code, capsys.readouterr()
    out = capsys.readouterr().out
    try:
        return json.loads(out)
    except ValueError:
        return [json.loads(line) for line in out.splitlines()]


async def test_the_command_line(
    probe: TaskProbe, client_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    me = ["--config", client_file]
    new = ["submit", "--target", TARGET, *me, "--capability"]
    done = await command(capsys, *new, "work", "--data", '{"text": "x"}', "--wait", "--timeout", "15")
    assert done["artifacts"][0]["data"] == {"worked": "x"}
    named = await command(capsys, *new, "pieces", "--data", '{"count": 1}')
    reference = named["reference"]
    assert named["id"] in reference
    assert named["full_reference"].startswith(f"{reference}@spiffe://")  # for others, who may approve of it
    await asyncio.wait_for(probe.entered.wait(), PATIENCE)
    assert (await command(capsys, "task", "get", reference, *me))["state"] == "working"
    probe.take_turns(1)
    events = await command(capsys, "task", "watch", reference, *me)
    assert [one.get("state") or one["kind"] for one in events] == [
        *("working", "artifact", "progress", "completed")
    ]
    rest = await command(capsys, "task", "watch", reference, "--after", events[2]["cursor"], *me)
    assert rest == events[3]
    assert (await command(capsys, "task", "get", reference, *me))["result"]["artifacts"][0]["data"] == {
        "count": 1
    }
    assert (await command(capsys, "task", "cancel", reference, *me, code=1))["state"] == "completed"


async def test_the_command_line_cancels_by_name_and_lists(
    probe: TaskProbe, client_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    me = ["--config", client_file]
    new = ["submit", "--target", TARGET, *me, "--capability", "pieces", "--data", '{"count": 1}']
    running, queued = [(await command(capsys, *new))["reference"] for _ in range(2)]
    await asyncio.wait_for(probe.entered.wait(), PATIENCE)
    said = await command(capsys, "task", "cancel", queued, "--reason", "twice", *me)
    assert (said["state"], said["message"]) == ("canceled", "twice")
    await command(capsys, "task", "watch", queued, *me, code=1)
    probe.take_turns(1)
    await command(capsys, "task", "watch", running, *me)
    listed = await command(capsys, "task", "list", *me)
    assert [(one["reference"], one["state"]) for one in listed] == [
        (running, "completed"),
        (queued, "canceled"),
    ]
    assert len(await command(capsys, "task", "list", "--limit", "1", *me)) == 1


async def test_the_command_line_says_when_a_task_is_due(
    probe: TaskProbe, client_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    me = ["--config", client_file]
    new = ["submit", "--target", TARGET, *me, "--capability", "work", "--data", '{"text": "x"}']
    submitted = await command(capsys, *new, "--every", "30 2 * * *")
    nightly = submitted["reference"]
    later = (await command(capsys, *new, "--delay", "86400"))["reference"]
    status = await command(capsys, "task", "get", nightly, *me)
    assert (status["state"], status["every"]) == ("submitted", "30 2 * * *")
    assert status["due_at"] % 86_400_000 == 9_000_000
    assert submitted["due_at"] == status["due_at"]
    known = {one["reference"]: one for one in await command(capsys, "task", "list", *me)}
    assert known[nightly]["due_at"] == status["due_at"]
    assert known[later]["due_at"] >= known[later]["submitted"] + 86_000_000
    for reference in (nightly, later):
        await command(capsys, "task", "cancel", reference, *me)
    capsys.readouterr()
    assert await asyncio.to_thread(main, ["task", "watch", nightly, *me]) == 1
    assert "every 30 2 * * *" in capsys.readouterr().err


async def test_the_command_line_tells_of_a_task_that_is_not_there_or_not_ones_own(
    probe: TaskProbe,
    client_file: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    me, reference = ["--config", client_file], f"{TARGET}#work/01890a5d-ac96-774b-bcce-b302099a8057"
    assert (await command(capsys, "task", "get", reference, *me, code=1))["state"] == "unknown"
    for verb in ("get", "watch"):
        code = await asyncio.to_thread(main, ["task", verb, f"{reference}@{TARGET}", *me])
        told = capsys.readouterr().err
        assert (code, "not this identity's to read" in told, "aw.state" in told) == (3, True, False), told
    # A command has no log: Python prints its warnings as they are.
    assert not [
        one for one in caplog.records if one.levelname == "WARNING" and "aw.state" in one.getMessage()
    ]
