"""A call from end to end, over a real broker with mutual TLS."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import anyio
import anyio.to_thread
import pytest

from agentweave_bus import AgentWeaveClient, SyncAgentWeaveClient
from agentweave_bus.exceptions import AuthorizationError, CallTimeoutError, CircuitOpenError, NoResponderError
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, FRONT, MIDDLE, OTHER, PATIENCE, Probe, data_of
from tests.integration.processes import worker_process
from tests.integration.world import metric

pytestmark = pytest.mark.anyio

PRINCIPAL = {"iss": "https://login.example", "sub": "ada"}


async def test_a_call_runs_once_and_both_logs_tell_of_it(world, echo, cli):
    assert await cli.ask(ECHO, "work", {"text": "hi"}) == {"worked": "hi"}
    assert echo.ran == ["work"]
    sent = world.audit("cli", event="call", cap="work")[-1]
    taken = world.audit("echo", event="admission", cap="work")[-1]
    assert sent["digest"] == taken["digest"]
    assert taken["caller"] == str(CLI)
    assert taken["allowed"] is True
    outcome = world.audit("echo", event="outcome")[-1]
    assert outcome["digest"] == sent["digest"]
    assert outcome["status"] == "completed"


async def test_a_call_between_two_processes(world, cli):
    async with worker_process(world, ECHO) as worker:
        assert worker.ready.startswith("ready")
        answer = await cli.ask(ECHO, "say", {"text": "hi"})
        assert answer == {"said": "hi", "pid": worker.process.pid, "caller": str(CLI)}
        answers = [await cli.ask(ECHO, "work", {"text": str(i)}) for i in range(5)]
        assert [one["worked"] for one in answers] == list("01234")


async def test_sigterm_lets_a_call_in_flight_finish_and_takes_no_new_one(world, cli, tmp_path):
    async with worker_process(world, ECHO) as worker, anyio.create_task_group() as group:
        mark, gate = tmp_path / "mark", tmp_path / "gate"
        answers = []

        async def ask():
            answers.append(await cli.ask(ECHO, "wait", {"mark": str(mark), "until": str(gate)}))

        group.start_soon(ask)
        await until(mark.exists, "the handler's beginning")
        worker.process.terminate()
        await until(lambda: "stopping on SIGTERM" in worker.log.read_text(), "the signal")
        with anyio.fail_after(PATIENCE):  # nobody takes calls now: the broker says so at once
            while True:
                try:
                    await cli.call(str(ECHO), "say", {"text": "more"}, timeout=5)
                except (NoResponderError, CircuitOpenError):
                    break
        assert worker.process.poll() is None
        gate.touch()
        assert await worker.wait() == 0
    assert answers == [{"waited": True, "pid": worker.process.pid}]


@pytest.mark.slow  # it starts processes of its own
async def test_a_worker_that_can_not_start_says_why_and_does_not_say_ready(world):
    async with worker_process(world, ECHO, klass="live_agents:Broken") as worker:
        assert worker.ready == ""
        assert await worker.wait() != 0
        assert "no database" in worker.log.read_text()
    async with worker_process(world, ECHO, klass="live_agents:Nothing") as worker:
        assert await worker.wait() == 2
        assert "live_agents has no 'Nothing'" in worker.log.read_text()


async def test_what_starting_left_is_settled_once_and_before_the_worker_says_ready(world, cli):
    async with worker_process(world, ECHO, klass="live_agents:Frozen") as worker:
        assert worker.ready.startswith("ready")
        await cli.ask(ECHO, "work", {"text": "x"})
        before, after = worker.log.read_text().split("is ready")
    assert before.splitlines().count("frozen") == 1
    assert "frozen" not in after


async def test_300_calls_are_in_flight_at_the_same_time(world, cli):
    echo = await world.agent(ECHO, bus__max_in_flight=600)  # half of the places, for one caller
    async with anyio.create_task_group() as group:
        for _ in range(300):
            group.start_soon(cli.ask, ECHO, "wait")
        await until(lambda: len(echo.ran) == 300, "300 handlers")
        assert metric(cli.parts, "agentweave_calls_in_flight", direction="outbound") == 300
        echo.gate.set()
    assert echo.most_at_once == 300
    assert metric(cli.parts, "agentweave_calls_in_flight", direction="outbound") == 0


async def test_a_handler_that_blocks_its_thread_stops_nobody_else(world, echo, cli):
    async with anyio.create_task_group() as group:
        group.start_soon(cli.ask, ECHO, "block")
        with anyio.fail_after(PATIENCE):
            await echo.entered.wait()
        assert await cli.ask(ECHO, "say", {"text": "meanwhile"}) == {"said": "meanwhile"}
        echo.thread_gate.set()
    assert echo.ran == ["block", "say"]


async def test_a_handlers_failure_is_a_failed_result_that_gives_nothing_away(echo, cli, caplog):
    result = await cli.call(str(ECHO), "boom")
    assert result.status == "failed"
    assert "secret" not in str(result)
    number = result.error.rpartition(" ")[2]
    record = next(one for one in caplog.records if getattr(one, "correlation_id", "") == number)
    assert "a secret of the handler" in str(record.exc_info)
    declined = await cli.call(str(ECHO), "decline")
    assert (declined.status, declined.error) == ("failed", "out of stock")


async def test_calls_before_on_start_ends_wait_for_it(world, cli):
    class Slow(Probe):
        begun: asyncio.Event

        async def on_start(self):
            self.begun.set()
            await super().on_start()

    Slow.begun = asyncio.Event()
    running = await world.start(ECHO, Slow)
    running.agent.may_start.clear()
    await running.until(Slow.begun)
    async with anyio.create_task_group() as group:
        answers = []

        async def ask():
            answers.append(await cli.ask(ECHO, "work", {"text": "early"}))

        group.start_soon(ask)
        await until(  # admitted, so it was received and has not been dropped
            lambda: world.audit("echo", event="admission", cap="work", id=_last_id(world)) != [], "admission"
        )
        assert running.agent.ran == []
        running.agent.may_start.set()
    assert answers == [{"worked": "early"}]


def _last_id(world):
    calls = world.audit("cli", event="call")
    return calls[-1]["id"] if calls else None


async def test_a_nested_call_proves_for_whom_and_has_no_more_time_than_its_parent(world, cli, echo):
    await world.agent(FRONT)
    await world.agent(MIDDLE)
    answer = await cli.ask(
        FRONT,
        "relay",
        {"path": [MIDDLE, ECHO], "name": "whoami", "payload": {}},
        timeout=20,
        principal=PRINCIPAL,
    )
    told = answer["value"]["value"]
    assert told["caller"] == str(MIDDLE)
    assert told["via"] == [
        {"iss": str(CLI), "aud": str(FRONT), "cap": "relay"},
        {"iss": str(FRONT), "aud": str(MIDDLE), "cap": "relay"},
    ]
    assert told["principal"] == PRINCIPAL
    first = world.audit("front", event="admission")[-1]
    last = world.audit("echo", event="admission")[-1]
    assert last["input"]["context"]["principal"] == PRINCIPAL
    assert [link["iss"] for link in last["input"]["context"]["via"]] == [str(CLI), str(FRONT)]
    sent = world.audit("cli", event="call")[-1]
    assert first["digest"] == sent["digest"]
    # 300 s were asked for at each further hop, 20 s by the origin.
    assert told["deadline_ms"] <= sent_at_ms(sent) + 20_000


def sent_at_ms(record):
    """UUIDv7 begins with the time, in milliseconds."""
    return int(record["id"].replace("-", "")[:12], 16)


async def test_a_scope_limits_what_follows_from_a_call(world, cli, echo):
    await world.agent(FRONT)
    call = {"path": [ECHO], "name": "work", "payload": {"text": "x"}}
    allowed = await cli.ask(FRONT, "relay", call, scope=[f"{FRONT}#relay", f"{ECHO}#work"])
    assert allowed["status"] == "completed"
    with_default = await cli.ask(
        FRONT, "relay", {**call, "name": "whoami", "payload": {}}, principal=PRINCIPAL
    )
    assert f"{ECHO}#whoami" in with_default["value"]["scope"]
    ran = list(echo.ran)
    refused = await cli.call(
        str(FRONT), "relay", call, scope=[f"{FRONT}#relay", f"{ECHO}#say"], timeout=PATIENCE
    )
    assert refused.status == "failed"
    assert echo.ran == ran
    assert [one["cap"] for one in world.audit("front", event="call")] == ["work", "whoami"]  # never sent


async def test_only_the_origin_names_a_principal_and_only_a_granted_one(world, cli, echo):
    with pytest.raises(AuthorizationError):
        await cli.call(str(ECHO), "whoami", principal={"iss": "https://evil.example", "sub": "ada"})
    assert echo.ran == []
    told = await cli.ask(ECHO, "whoami", principal=PRINCIPAL)
    assert told["principal"] == PRINCIPAL


async def test_what_a_block_raises_leaves_it_as_it_is(world, echo):
    with pytest.raises(AuthorizationError):
        async with AgentWeaveClient(world.config(OTHER)) as client:
            await client.call(str(ECHO), "say", {"text": "x"})


async def test_the_synchronous_client_calls_from_threads(world, echo):
    def script():
        with SyncAgentWeaveClient(world.config(CLI)) as client:
            assert client.spiffe_id == CLI
            said = []
            threads = [
                threading.Thread(
                    target=lambda i=i: said.append(client.call(str(ECHO), "say", {"text": str(i)}))
                )
                for i in range(8)
            ]
            for one in threads:
                one.start()
            for one in threads:
                one.join(PATIENCE)
            with pytest.raises(AuthorizationError):
                client.call(str(FRONT), "whoami", {})
            return sorted(data_of(one)["said"] for one in said), threading.active_count()

    texts, _ = await anyio.to_thread.run_sync(script)
    assert texts == list("01234567")
    assert not [one for one in threading.enumerate() if one.name == "agentweave-client"]


async def test_no_answer_in_time_is_a_timeout_and_the_late_answer_is_dropped(echo, cli):
    with pytest.raises(
        CallTimeoutError, match=r"no answer from .*agent/echo to 'stubborn' in time; the work may"
    ):
        await cli.call(str(ECHO), "stubborn", timeout=0.5)
    assert echo.ran == ["wait"]
    echo.gate.set()
    await until(lambda: cli.dropped("late") == 1, "the late answer")


async def test_answers_of_one_turn_share_a_signature(echo, cli):
    """Many calls at once cost few signatures: what arrives together is answered together."""
    before = len(cli.parts.verifier._roots)
    async with anyio.create_task_group() as group:
        for _ in range(64):
            group.start_soon(cli.ask, ECHO, "say", {"text": "x"})
    assert len(cli.parts.verifier._roots) - before < 48


async def test_a_handler_that_takes_too_long_is_told_of_while_its_caller_still_waits(world, echo, cli):
    """With a signed answer, whose correlation id finds it in the callee's log; not by silence.

    It leaves a tenth of a second before the deadline, which a machine with other work may let pass: one of
    five such answers has to be in time.
    """
    result, tries = None, 0
    while result is None and tries < 5:
        tries += 1
        with contextlib.suppress(CallTimeoutError):
            result = await cli.call(str(ECHO), "wait", timeout=1.0)
    assert result is not None
    assert result.status == "failed"
    assert result.error.startswith("deadline exceeded; correlation id ")
    assert echo.ran == ["wait"] * tries
