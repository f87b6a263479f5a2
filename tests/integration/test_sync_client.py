"""A client of a script that fails while it is in use: who asks it then is told why."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import pytest

from agentweave_bus import SyncAgentWeaveClient
from agentweave_bus.bus.connection import Keeper
from agentweave_bus.exceptions import (
    AgentCallError,
    AgentWeaveError,
    AuditError,
    AuthorizationError,
    ConnectionLostError,
)
from agentweave_bus.runtime.surroundings import REAL
from agentweave_bus.runtime.wiring import Connected
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, PATIENCE, Probe
from tests.integration.world import World

pytestmark = pytest.mark.anyio


class Failing:
    """A client one of whose own tasks fails when it is told to."""

    def __init__(self, world: World) -> None:
        self.failure: Exception = RuntimeError("a watch fell over")
        self.may_close = threading.Event()
        self.may_close.set()
        self.closing = threading.Event()
        self.loop: asyncio.AbstractEventLoop
        self.thread: threading.Thread
        self._now: asyncio.Event
        surroundings = replace(REAL, on_wired=self._wired)
        self.client = SyncAgentWeaveClient(world.config(CLI), surroundings=surroundings)

    def _wired(self, parts: object) -> None:
        assert isinstance(parts, Connected)
        self.loop, self._now = asyncio.get_running_loop(), asyncio.Event()
        self.thread = threading.current_thread()
        connected = parts.keeper.open

        async def run() -> None:
            await self._now.wait()
            raise self.failure

        @asynccontextmanager
        async def connect(**options: Any) -> AsyncIterator[Keeper]:
            async with connected(**options) as keeper:
                try:
                    yield keeper
                finally:
                    self.closing.set()
                    with anyio.CancelScope(shield=True):
                        await asyncio.to_thread(self.may_close.wait, PATIENCE)

        # Nothing of its own makes a client fail at a moment that a test can choose.
        parts.authorizer.run = run  # type: ignore[method-assign]
        parts.keeper.open = connect  # type: ignore[method-assign]

    def fail(self) -> None:
        self.loop.call_soon_threadsafe(self._now.set)

    def end(self) -> None:
        """Fail, and return when all is over."""
        self.fail()
        self.gone()

    def gone(self) -> None:
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.fixture
async def failing(world: World) -> Failing:
    return Failing(world)


@pytest.fixture
def unheard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Collect what threads raise that nobody takes: it must all come to those who use the client."""
    found: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", found.append)
    yield found
    assert found == []


async def in_thread(script: Callable[[], None]) -> None:
    await asyncio.wait_for(asyncio.to_thread(script), 4 * PATIENCE)


async def test_calls_afterwards_are_told_why_and_so_is_who_leaves(
    failing: Failing, echo: Probe, unheard: list[Any]
) -> None:
    def script() -> None:
        with failing.client as client:
            task = client.task
            failing.end()
            for ask in (
                lambda: client.call(str(ECHO), "say", {"text": "x"}),
                lambda: client.publish("order.placed"),
                lambda: task("any"),
                lambda: client.spiffe_id,
            ):
                with pytest.raises(AgentWeaveError, match="RuntimeError: a watch fell over") as caught:
                    ask()
                assert caught.value.__cause__ is failing.failure

    with pytest.raises(AgentWeaveError, match=r"not connected any more, .* a watch fell over") as caught:
        await in_thread(script)
    assert caught.value.__cause__ is failing.failure
    assert echo.ran == []


async def test_calls_under_way_are_told_why(failing: Failing, echo: Probe, unheard: list[Any]) -> None:
    told: list[BaseException] = []

    def call() -> None:
        try:
            failing.client.call(str(ECHO), "wait", timeout=30)
        except BaseException as error:
            told.append(error)

    def enter() -> list[threading.Thread]:
        failing.client.__enter__()
        threads = [threading.Thread(target=call) for _ in range(3)]
        for one in threads:
            one.start()
        return threads

    threads = await asyncio.to_thread(enter)
    await until(lambda: echo.ran == ["wait"] * 3, "the calls")

    def leave() -> None:
        failing.end()
        for one in threads:
            one.join(PATIENCE)
        failing.client.__exit__(ValueError, ValueError("of the block"), None)

    await in_thread(leave)
    assert len(told) == 3
    for error in told:
        assert isinstance(error, ConnectionLostError), error
        assert error.__cause__ is failing.failure


async def test_what_the_block_raises_is_what_leaves_it(
    failing: Failing, unheard: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    def script() -> None:
        with failing.client:
            failing.end()
            raise KeyError("of the block")

    with pytest.raises(KeyError, match="of the block"):
        await in_thread(script)
    assert "the client failed, too" in caplog.text
    assert "a watch fell over" in caplog.text


async def test_a_call_that_tells_why_leaves_the_block_as_it_is(
    failing: Failing, unheard: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    raised: list[AgentWeaveError] = []

    def script() -> None:
        with failing.client as client:
            failing.end()
            try:
                client.call(str(ECHO), "say", {"text": "x"})
            except AgentWeaveError as error:
                raised.append(error)
                raise

    with pytest.raises(AgentWeaveError) as caught:
        await in_thread(script)
    assert caught.value is raised[0]
    assert "the client failed, too" not in caplog.text


async def test_who_leaves_is_told_an_error_of_this_package_as_it_is(
    failing: Failing, unheard: list[Any]
) -> None:
    failing.failure = AuditError("the disk is full")
    failing.failure.__cause__ = cause = OSError(28, "No space left on device")

    def script() -> None:
        with failing.client:
            failing.end()

    with pytest.raises(AuditError, match="the disk is full") as caught:
        await in_thread(script)
    assert caught.value is failing.failure
    assert caught.value.__cause__ is cause


async def test_while_it_goes_callers_wait_to_be_told_why(
    failing: Failing, echo: Probe, unheard: list[Any]
) -> None:
    failing.may_close.clear()

    def script() -> None:
        with failing.client as client:
            failing.fail()
            assert failing.closing.wait(PATIENCE)
            threading.Timer(0.2, failing.may_close.set).start()
            client.call(str(ECHO), "say", {"text": "x"})

    with pytest.raises(AgentWeaveError, match="a watch fell over") as caught:
        await in_thread(script)
    assert caught.value.__cause__ is failing.failure
    assert echo.ran == []


async def test_what_goes_on_while_the_client_goes_is_told_why(failing: Failing, unheard: list[Any]) -> None:
    failing.may_close.clear()
    asynchronous = failing.client._client

    async def late() -> Any:
        """Ask in two steps, as submitting many does; the second comes too late."""
        failing.fail()
        assert await asyncio.to_thread(failing.closing.wait, PATIENCE)
        threading.Timer(0.2, failing.may_close.set).start()
        return await asynchronous.call(str(ECHO), "say", {"text": "x"})

    def script() -> None:
        with failing.client as client:
            client._run(late)

    with pytest.raises(ConnectionLostError, match="a watch fell over") as caught:
        await in_thread(script)
    assert caught.value.__cause__ is failing.failure


async def test_errors_of_the_call_itself_stay_as_they_are(
    failing: Failing, echo: Probe, unheard: list[Any]
) -> None:
    failing.may_close.clear()

    async def denied() -> None:
        failing.fail()
        assert await asyncio.to_thread(failing.closing.wait, PATIENCE)
        threading.Timer(0.2, failing.may_close.set).start()
        raise AuthorizationError("no grant")

    def script() -> None:
        with failing.client as client:
            client._run(denied)

    with pytest.raises(AuthorizationError, match="no grant"):
        await in_thread(script)


async def test_a_broken_connection_is_no_failure_of_the_client(
    failing: Failing, world: World, echo: Probe, unheard: list[Any]
) -> None:
    def script() -> None:
        with failing.client as client:
            client.call(str(ECHO), "wait", timeout=30)

    async def kill() -> None:
        await echo.entered.wait()
        await world.stack.nats.kill()

    with pytest.raises(ConnectionLostError, match=r"the connection was lost while .* was asked"):
        await asyncio.gather(in_thread(script), kill())


async def test_a_loop_that_breaks_off_its_own_end_leaves_nobody_waiting(
    failing: Failing, unheard: list[Any]
) -> None:
    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            asyncio.get_running_loop().stop()
            await asyncio.Event().wait()

    def script() -> None:
        with failing.client as client:
            threading.Timer(0.2, failing.fail).start()
            client._run(stubborn)

    with pytest.raises(ConnectionLostError, match="the client ended while this was under way"):
        await in_thread(script)


async def test_a_loop_that_is_stopped_leaves_nobody_waiting(
    failing: Failing, echo: Probe, unheard: list[Any]
) -> None:
    def script() -> None:
        with failing.client as client:
            threading.Timer(0.2, lambda: failing.loop.call_soon_threadsafe(failing.loop.stop)).start()
            client.call(str(ECHO), "wait", timeout=30)

    with pytest.raises(AgentCallError, match="may have been done"):
        await in_thread(script)


async def test_a_call_that_another_thread_makes_while_the_block_is_left(
    world: World, echo: Probe, unheard: list[Any]
) -> None:
    client = SyncAgentWeaveClient(world.config(CLI))
    told: list[BaseException] = []

    def call() -> None:
        try:
            client.call(str(ECHO), "wait", timeout=30)
        except BaseException as error:
            told.append(error)

    await asyncio.to_thread(client.__enter__)
    calling = threading.Thread(target=call)
    calling.start()
    await asyncio.wait_for(echo.entered.wait(), PATIENCE)
    await asyncio.to_thread(client.__exit__, None, None, None)
    await asyncio.to_thread(calling.join, PATIENCE)
    assert [isinstance(error, AgentCallError) for error in told] == [True], told
    with pytest.raises(AgentWeaveError, match="use it inside its `with` block"):
        client.call(str(ECHO), "say", {"text": "x"})


async def test_a_client_that_is_entered_twice_goes_on(failing: Failing, echo: Probe) -> None:
    def script() -> None:
        with failing.client as client:
            with pytest.raises(AgentWeaveError, match="in use already"):
                client.__enter__()
            assert client.call(str(ECHO), "say", {"text": "x"}).status == "completed"
        failing.gone()

    await in_thread(script)
