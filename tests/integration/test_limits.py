"""Everything that could grow is bounded, and a callee that fails is left alone for a while."""

from __future__ import annotations

import anyio
import pytest

from agentweave_bus.exceptions import CallRefusedError, CircuitOpenError, NoResponderError
from tests.integration.connections import until
from tests.integration.probes import ABSENT, ECHO

pytestmark = pytest.mark.anyio


async def test_no_more_handlers_run_at_once_than_configured(world, cli):
    echo = await world.agent(ECHO, bus__max_in_flight=4)
    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(cli.ask, ECHO, "wait")
        await until(lambda: len(echo.ran) == 4, "the first four")
        # One round trip later nobody else has begun, although all 20 are here.
        await cli.parts.keeper.session(1)
        await (await cli.parts.keeper.session(1)).flush(5)
        assert len(echo.ran) == 4
        echo.gate.set()
    assert echo.most_at_once == 4
    assert len(echo.ran) == 20


async def test_no_more_calls_are_pending_than_configured(world, echo):
    cli = await world.client(bus__max_pending_calls=5)
    refused, answered = [], []

    async def ask():
        try:
            answered.append(await cli.ask(ECHO, "wait"))
        except CallRefusedError as error:
            refused.append(error)

    async with anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(ask)
        await until(lambda: len(refused) == 15 and len(echo.ran) == 5, "fifteen refusals")
        echo.gate.set()
    assert len(answered) == 5
    assert {(one.step, one.reason) for one in refused} == {("local", "busy")}
    assert "bus.max_pending_calls" in str(refused[0])
    assert await cli.ask(ECHO, "say", {"text": "room again"})


async def test_nothing_is_kept_of_calls_that_have_ended(world, echo, cli):
    async with anyio.create_task_group() as group:
        for number in range(100):
            group.start_soon(cli.ask, ECHO, "work", {"text": str(number)})
    for _ in range(3):
        with pytest.raises(CallRefusedError):
            await cli.call(str(ECHO), "say", {"text": 3})
    for parts in (cli.parts, echo.parts):
        session = await parts.keeper.session(1)
        await until(lambda session=session: session.in_flight == 0, "idleness")
        assert session._answers == {}
        assert session._waiting == set()
        assert parts.client.transport._calls == {}
        assert parts.client.transport._pending == 0


async def test_a_failing_callee_is_left_alone_and_tried_again(world, cli, echo):
    caller = await world.client(
        bus__circuit_breaker={"failure_threshold": 2, "success_threshold": 1, "timeout": 0.5},
        bus__retry={"attempts": 1},
    )
    for _ in range(2):
        with pytest.raises(NoResponderError):
            await caller.call(str(ABSENT), "say", {"text": "x"})
    sent = len(world.audit("cli", event="call"))
    with pytest.raises(CircuitOpenError, match=rf"calls to {ABSENT} failed lately") as opened:
        await caller.call(str(ABSENT), "say", {"text": "x"})
    assert 0 < opened.value.retry_after <= 0.5
    assert len(world.audit("cli", event="call")) == sent
    assert await caller.ask(ECHO, "say", {"text": "others are not concerned"})
    await world.agent(ABSENT)
    with anyio.fail_after(15):
        while True:
            try:
                assert await caller.ask(ABSENT, "say", {"text": "back"}) == {"said": "back"}
                break
            except CircuitOpenError as error:
                await anyio.sleep(error.retry_after)
    assert await caller.ask(ABSENT, "say", {"text": "still"})


async def test_denials_and_refusals_open_no_breaker(world, echo):
    caller = await world.client(
        bus__circuit_breaker={"failure_threshold": 1, "success_threshold": 1, "timeout": 30}
    )
    for _ in range(3):
        with pytest.raises(CallRefusedError):
            await caller.call(str(ECHO), "say", {"text": 3})
        with pytest.raises(CallRefusedError):
            await caller.call(str(ECHO), "say", {"text": "x" * 900_000})
    assert await caller.ask(ECHO, "say", {"text": "x"})
