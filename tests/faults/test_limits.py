"""Everything that could grow is bounded, and a callee that fails is left alone for a while."""

from __future__ import annotations

from functools import partial

import anyio
import pytest

from agentweave_bus.bus import admission
from agentweave_bus.bus.subjects import Family, agent_prefix
from agentweave_bus.envelope import ReplayFilter
from agentweave_bus.exceptions import (
    AuthorizationError,
    CallRefusedError,
    CallTimeoutError,
    CircuitOpenError,
    NoResponderError,
)
from tests.integration.connections import until
from tests.integration.probes import ABSENT, ECHO, FRONT, GRANTS, OTHER, PATIENCE

pytestmark = pytest.mark.anyio


async def test_no_more_handlers_run_at_once_than_configured(world, cli):
    echo = await world.agent(ECHO, bus__max_in_flight=8)
    async with anyio.create_task_group() as group:
        for _ in range(14):
            group.start_soon(cli.ask, ECHO, "wait")
        await until(lambda: len(echo.ran) == 4, "the first four: half of the places")
        # One round trip later nobody else has begun, although all are here.
        await cli.parts.keeper.session(1)
        await (await cli.parts.keeper.session(1)).flush(5)
        assert len(echo.ran) == 4
        echo.gate.set()
    assert echo.most_at_once == 4
    assert len(echo.ran) == 14


async def test_the_bytes_of_one_caller_have_a_bound_too_and_others_find_room(world, cli):
    """Two MiB in all: of one caller two calls of 400 kB, and the third is told that the agent is busy."""
    echo = await world.agent(ECHO, bus__max_in_flight_bytes=2 * 1024 * 1024)
    impatient = await world.client(bus__retry__attempts=1)
    large = {"text": "x" * 400_000}
    async with anyio.create_task_group() as group:
        for _ in range(2):
            group.start_soon(impatient.ask, ECHO, "hold", large)
        await until(lambda: len(echo.ran) == 2, "two that are held")
        with pytest.raises(CallRefusedError) as refused:
            await impatient.call(str(ECHO), "hold", large)
        assert (refused.value.step, refused.value.retry_after) == ("room", 0.2)
        assert "too many bytes" in world.refusals("echo")[-1]["reason"]
        assert await impatient.ask(ECHO, "say", {"text": "small"})
        front = await world.client(FRONT)
        assert await front.ask(ECHO, "work", large) == {"worked": large["text"]}
        echo.gate.set()
    assert await impatient.ask(ECHO, "hold", {"text": "x" * 780_000})  # there is room again
    session = await echo.parts.keeper.session(1)
    of_calls = [one for one in session._serving if one.subject.startswith("aw.call.")]
    assert {one._pending_bytes_limit for one in of_calls} == {16 * 1024 * 1024}


async def test_who_calls_more_than_can_be_remembered_is_refused_and_nobody_else(world, cli, monkeypatch):
    """Eight calls can be remembered, of one caller as many as are free. What is refused so is not answered."""
    monkeypatch.setattr(admission, "ReplayFilter", partial(ReplayFilter, max_entries=8))
    echo = await world.agent(ECHO)
    front = await world.client(FRONT)
    for _ in range(4):
        await cli.ask(ECHO, "say", {"text": "x"})
    with pytest.raises(CallTimeoutError):
        await cli.call(str(ECHO), "say", {"text": "x"}, timeout=1.0)
    refusal = await world.refusal("echo", step_name="replay")
    assert refusal["reason"] == "too many calls of this sender to remember"
    assert refusal["iss"] == str(cli.parts.me)
    for _ in range(2):
        await front.ask(ECHO, "say", {"text": "x"})
    assert echo.ran == ["say"] * 6


@pytest.mark.slow
async def test_one_caller_keeps_no_other_out_and_hears_that_the_agent_is_busy(world, cli):
    """Of eight places it gets four, and of the 32 that are taken in sixteen; a second caller is served."""
    given = {"caller": str(OTHER), "callee": [str(ECHO)], "capabilities": ["say"]}
    echo = await world.agent(ECHO, bus__max_in_flight=8)
    refused = []

    async def ask():
        try:
            await cli.ask(ECHO, "wait")
        except CallRefusedError as error:
            refused.append(error)

    try:
        world.grant({"grants": [*GRANTS["grants"], given]})
        other = await world.client(OTHER)
        async with anyio.create_task_group() as group:
            for _ in range(30):
                group.start_soon(ask)
            await until(lambda: len(refused) == 14, "fourteen that are told to come again")
            with anyio.fail_after(PATIENCE):
                while True:
                    try:
                        assert await other.ask(ECHO, "say", {"text": "me"}) == {"said": "me"}
                        break
                    except (AuthorizationError, NoResponderError):
                        await anyio.sleep(0.05)  # the grant is on its way
            echo.gate.set()
    finally:
        world.grant(GRANTS)
    assert {one.step for one in refused} == {"room"}
    assert all(one.retry_after for one in refused)
    assert echo.ran.count("wait") == 16


async def test_who_is_denied_by_a_limit_claims_nothing(world, mallory):
    """The limit is asked before the claim is made, or a caller could fill its callee's claims."""
    echo = await world.agent(ECHO)
    limited = {
        "caller": str(OTHER), "callee": [str(ECHO)], "capabilities": ["work"], "limits": {"max_per_minute": 2}
    }  # fmt: skip
    try:
        world.grant({"grants": [*GRANTS["grants"], limited]})
        other = await world.client(OTHER)
        claims = await mallory.listen(f"{agent_prefix(Family.CLAIM, ECHO)}.*")
        denied = 0
        with anyio.fail_after(PATIENCE):
            while denied < 5:
                try:
                    await other.ask(ECHO, "work", {"text": "x"})
                except AuthorizationError as error:
                    denied += "minute" in error.reason
                except NoResponderError:
                    pass
                await anyio.sleep(0.02)
    finally:
        world.grant(GRANTS)
    assert claims.qsize() == echo.ran.count("work") <= 2


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
        bus__retry={"attempts": 1, "patience": 0.1},
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
    with anyio.fail_after(30):
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
