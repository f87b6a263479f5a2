"""``agentweave dev``: agents in one process, taken up anew as they change, by the same gate as everywhere."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml

from agentweave_bus.cli.checks.finding import Status, run_checks
from agentweave_bus.cli.checks.patient import examine
from agentweave_bus.cli.doctor import Doctor
from agentweave_bus.exceptions import AuthorizationError
from agentweave_bus.runtime import AgentWeaveClient
from tests.integration.dev_stack import BACK, FILES, FRONT, Running, client_of, lives, running, until
from tests.integration.probes import PATIENCE

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def dev(tmp_path_factory: pytest.TempPathFactory, anyio_backend: str) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("dev"), "dev", "--hold", "0.2") as one:
        yield one


@pytest.fixture(scope="module")
async def cli(dev: Running) -> AsyncIterator[AgentWeaveClient]:
    async with client_of(dev) as client:
        yield client


async def answer_of(cli: AgentWeaveClient) -> str:
    result = await cli.call(FRONT, "ask", {"word": "x"})
    assert result.data is not None, result.error
    return str(result.data["answer"])


async def test_all_are_in_this_process_and_the_next_call_has_the_changed_answer(
    dev: Running, cli: AgentWeaveClient
) -> None:
    result = await cli.call(FRONT, "ask", {"word": "x"})
    assert result.data == {"answer": "first x", "pid": dev.process.pid}
    since = len(dev.log)
    dev.edit("words.py", "first", "other")  # of the same length, within the same second
    await dev.until("serving", since)
    assert await answer_of(cli) == "other x"
    assert "front | " not in dev.log[since:]  # whom it does not concern is left alone


async def test_a_mistake_keeps_everybody_as_before_and_says_where(
    dev: Running, cli: AgentWeaveClient
) -> None:
    since = len(dev.log)
    before = await answer_of(cli)
    dev.edit("back.py", "class Back", "clas Back")
    await dev.until("SyntaxError", since)
    said = dev.log[since:]
    assert f'{dev.folder / "back.py"}", line 8' in said
    assert "clas Back" in said
    assert "back can't be imported (back as before the change)" in said
    assert await answer_of(cli) == before

    since = len(dev.log)
    dev.edit("back.py", "clas Back(SecureAgent):", "class Back(SecureAgent):\n    oops = undefined")
    await dev.until("NameError", since)
    said = dev.log[since:]
    assert "oops = undefined" in said
    assert "importlib" not in said  # the user's own lines only
    assert await answer_of(cli) == before

    since = len(dev.log)
    dev.edit("back.py", "    oops = undefined\n", "")
    await dev.until("serving front, back", since)
    assert await answer_of(cli) == before


async def test_what_fails_after_the_import_keeps_nobody_else_from_working(
    dev: Running, cli: AgentWeaveClient
) -> None:
    since = len(dev.log)
    hook = (
        "class Back(SecureAgent):\n    async def on_start(self):\n        raise RuntimeError('no database')\n"
    )
    dev.edit("back.py", "class Back(SecureAgent):\n", hook)
    await dev.until("back is not served until something changes", since)
    assert "RuntimeError: no database" in dev.log[since:]
    assert (await cli.call(FRONT, "echo", {"word": "x"})).data == {"front": "x"}

    since = len(dev.log)
    dev.edit("back.py", hook, "class Back(SecureAgent):\n")
    await dev.until("serving front, back", since)
    assert (await answer_of(cli)).endswith(" x")


async def test_what_is_in_flight_is_finished_before_its_agent_is_taken_up_anew(
    dev: Running, cli: AgentWeaveClient
) -> None:
    results: list[Any] = []

    async def ask() -> None:
        asked = {"seconds": 0.0, "timeout": 10.0, "afterwards": 0.8}
        results.append(await cli.call(FRONT, "patience", asked))

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await anyio.sleep(0.2)
        since = len(dev.log)
        dev.edit("back.py", '"nested": nested', '"fresh": True, "nested": nested')
        await dev.until("back.py changed", since)
    assert results[0].data["nested"] == "after"
    assert "fresh" not in results[0].data
    await dev.until("serving front, back", since)
    result = await cli.call(FRONT, "patience", {"seconds": 0.0, "timeout": 10.0})
    assert result.data is not None, result.error
    assert result.data["fresh"]


async def test_who_has_no_grant_is_refused(dev: Running, cli: AgentWeaveClient) -> None:
    with pytest.raises(AuthorizationError, match="no grant lets"):
        await cli.call(BACK, "secret")
    # A caller that goes by a policy of its own meets the broker's users, and the agent's own policy.
    wide = dev.folder / "wide.yaml"
    wide.write_text(f"grants: [{{caller: '{cli.spiffe_id}', callee: '{BACK}', capabilities: ['*']}}]")
    mine = yaml.safe_load((dev.folder / ".agentweave" / "clients" / "cli.yaml").read_text())
    mine["authorization"]["bundle"] = str(wide)
    (dev.folder / "mine.yaml").write_text(yaml.safe_dump(mine))
    async with AgentWeaveClient(dev.folder / "mine.yaml") as other:
        with pytest.raises(AuthorizationError, match="the broker does not let this identity call"):
            await other.call(BACK, "secret")


async def test_changed_grants_take_effect(dev: Running, cli: AgentWeaveClient) -> None:
    async def asked() -> bool:
        try:
            return (await cli.call(BACK, "answer", {"word": "x"})).status == "completed"
        except AuthorizationError:
            return False

    assert not await asked()
    dev.edit("grants.yaml", "[once, health]", "[once, health, answer]")
    with anyio.fail_after(PATIENCE):
        while not await asked():  # noqa: ASYNC110 - another process
            await anyio.sleep(0.05)
    dev.edit("grants.yaml", "[once, health, answer]", "[once, health]")


async def test_what_is_in_flight_does_not_notice_that_it_was_held(
    dev: Running, cli: AgentWeaveClient
) -> None:
    """The handler holds the loop for longer than its caller waits, and calls somebody afterwards."""
    result = await cli.call(FRONT, "patience", {"seconds": 1.2, "timeout": 0.6}, timeout=30)
    assert result.data is not None, result.error
    assert result.data["nested"] == "after"
    assert 0 < result.data["left"] < 0.6


@pytest.mark.slow  # the clock must be behind by more than clocks may differ
async def test_a_task_from_outside_waits_until_the_clock_is_right_again(
    dev: Running, cli: AgentWeaveClient
) -> None:
    mark = dev.folder / "from-outside"
    results: list[Any] = []

    async def hold() -> None:
        asked = {"seconds": 4.0, "timeout": 5.0, "afterwards": 1.0}
        results.append(await cli.call(FRONT, "patience", asked, timeout=30))

    async with anyio.create_task_group() as group:
        group.start_soon(hold)
        await anyio.sleep(2.5)  # the loop is held meanwhile
        handle = await cli.submit(BACK, "once", {"mark": str(mark), "seconds": 0.0})
        status = await handle.result(timeout=30)
    assert status.data == {"attempt": 1}, status.error
    assert results[0].data["nested"] == "after"


@pytest.mark.parametrize("capability", ["look", "look_plain"])
async def test_a_breakpoint_opens_the_debugger_and_time_rests(
    dev: Running, cli: AgentWeaveClient, capability: str
) -> None:
    """So it does on the event loop and in the thread of a plain handler."""
    results: list[Any] = []

    async def ask() -> None:
        asked = {"capability": capability, "timeout": 0.5}
        results.append(await cli.call(FRONT, "look", asked, timeout=30))

    async with anyio.create_task_group() as group:
        since = len(dev.terminal.seen)
        group.start_soon(ask)
        assert '-> return {"looked": word}' in await dev.terminal.until("(Pdb) ", since)
        await anyio.sleep(0.8)
        assert results == []
        since = len(dev.terminal.seen)
        dev.terminal.type("p word * 2")
        assert "'seesee'" in await dev.terminal.until("(Pdb) ", since)
        dev.terminal.type("continue")
    assert results[0].data == {"looked": "see"}, results[0].error


async def test_a_task_runs_once_although_the_broker_gave_it_out_again(
    dev: Running, cli: AgentWeaveClient
) -> None:
    mark = dev.folder / "mark"
    handle = await cli.submit(BACK, "once", {"mark": str(mark), "seconds": 1.6})
    result = await handle.result(timeout=30)
    assert result.data == {"attempt": 1}
    assert mark.read_text() == "x"


async def test_ctrl_c_ends_it_in_order(dev: Running) -> None:
    broker = dev.facts["broker_pid"]
    assert lives(broker)
    assert await dev.end() == 0
    await until(lambda: not lives(broker), lambda: "the broker lives")
    assert [path for path in dev.runtime.rglob("*") if path.is_socket()] == []
    assert not list((dev.folder / ".agentweave" / "clients").glob("*"))
    assert "Traceback" not in dev.log


@pytest.mark.slow  # it starts a stack of its own
async def test_the_doctor_finds_its_agents_well_whatever_their_number_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = FILES["agentweave.yaml"].replace("front.yaml", "front.yaml\n    min: 1\n    max: 3")
    monkeypatch.setitem(FILES, "agentweave.yaml", several.replace("back.yaml", "back.yaml\n    replicas: 2"))
    monkeypatch.chdir(tmp_path)  # the stack's state is looked for there
    async with running(tmp_path, "dev") as one:
        patient = examine(None, "development", None)
        async with Doctor.of(patient, seconds=PATIENCE) as doctor:
            found = [finding async for finding in run_checks(doctor.checks(), deadline_s=PATIENCE)]
    told = (
        f"the stack is running: agentweave dev came up with every agent of it, in process {one.process.pid}"
    )
    assert [finding.found for name, finding in found if name == "stack"] == [told]
    assert [finding.found for _, finding in found if finding.status is Status.FAILED] == []


@pytest.mark.slow  # it starts a stack of its own
async def test_without_its_broker_it_ends_and_says_so(tmp_path: Path) -> None:
    async with running(tmp_path, "dev") as one:
        os.kill(one.facts["broker_pid"], signal.SIGKILL)
        with anyio.fail_after(60):  # bus.drain_timeout passes: nobody can be told how calls end
            assert await one.process.wait() == 4
        assert "agentweave: the broker ended (exit code -9); nobody can be reached any more." in one.log
