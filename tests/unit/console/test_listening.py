"""Where the console may listen, and what requests call it there."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import anyio
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from agentweave_bus.config.security import is_loopback
from agentweave_bus.console import listening
from agentweave_bus.console.listening import bind, names_of, serving
from agentweave_bus.console.opening import open_console
from agentweave_bus.exceptions import ConfigurationError


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "shop.test", "localhost.evil.test", "127.0.0.1.evil.test"]
)
def test_no_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_names() -> None:
    assert names_of("127.0.0.1", 8600) == ("http://127.0.0.1:8600/", {"127.0.0.1:8600", "localhost:8600"})
    assert names_of("::1", 8600) == ("http://[::1]:8600/", {"[::1]:8600", "localhost:8600"})
    assert names_of("Shop.test", 8600) == ("http://shop.test:8600/", {"shop.test:8600"})
    assert names_of("shop.test", 80)[1] == {"shop.test:80", "shop.test"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_every_address_at_once_is_none(host: str) -> None:
    with pytest.raises(ConfigurationError, match="stands for every address"):
        bind(host, 0)


def test_a_port_that_is_taken() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(ConfigurationError, match="can't listen"):
        bind("127.0.0.1", taken.getsockname()[1])


@pytest.mark.anyio
async def test_an_address_that_others_reach_wants_to_be_meant() -> None:
    with pytest.raises(ConfigurationError, match="plain HTTP"):
        async with open_console(operator="nowhere.yaml", host="shop.test"):
            pass


BODY = b"x" * 2_000_000
ASKING = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def bound() -> socket.socket:
    """Listen; what is sent to who takes nothing of it waits here, most of it."""
    made = bind("127.0.0.1", 0)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
    return made


async def asks(listener: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask, and take nothing until the reader is read from, but what is on its way."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, listener.getsockname())
    reader, writer = await asyncio.open_connection(sock=made, limit=1024)
    writer.write(ASKING)
    return reader, writer


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set when a connection has ended for who listens."""
    seen = asyncio.Event()
    seeing = listening._Impatient.connection_lost

    def connection_lost(one: Any, exc: Exception | None) -> None:
        seeing(one, exc)
        seen.set()

    monkeypatch.setattr(listening._Impatient, "connection_lost", connection_lost)
    return seen


@pytest.mark.anyio
@pytest.mark.parametrize("times", [1, 2], ids=["answered", "with an answer that waits"])
async def test_who_takes_no_answer_is_let_go(
    times: int, lost: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "REQUEST_SECONDS", 0.5)
    with bound() as listener:
        async with serving(Response(BODY), listener, lambda: None):
            _, writer = await asks(listener)
            for _ in range(1, times):
                await asyncio.sleep(0.1)  # not at once
                writer.write(ASKING)
            async with asyncio.timeout(30):
                await lost.wait()
            writer.transport.abort()


@pytest.mark.anyio
@pytest.mark.slow  # it waits for time to pass
async def test_who_takes_an_answer_slowly_gets_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "REQUEST_SECONDS", 2.0)
    with bound() as listener:
        async with serving(Response(BODY), listener, lambda: None):
            reader, writer = await asks(listener)
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(20):
                await asyncio.sleep(0.2)
                await reader.readexactly(len(BODY) // 20)
            writer.close()


@pytest.mark.anyio
@pytest.mark.slow  # it waits for time to pass
async def test_a_stream_of_events_ends_by_its_own_rule(
    lost: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "REQUEST_SECONDS", 0.3)
    given_up = asyncio.Event()

    async def stream(_scope: Scope, _receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": BODY, "more_body": True})
        await given_up.wait()

    with bound() as listener:
        async with serving(stream, listener, lambda: None):
            _, writer = await asks(listener)
            await asyncio.sleep(1.5)
            assert not lost.is_set()
            given_up.set()
            async with asyncio.timeout(30):
                await lost.wait()
            writer.transport.abort()


@pytest.mark.anyio
async def test_of_requests_that_come_at_once_the_first_is_answered() -> None:
    with bound() as listener:
        async with serving(Response("here"), listener, lambda: None):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(ASKING * 9_000)
            answers = b""
            async with asyncio.timeout(30):
                with contextlib.suppress(ConnectionResetError):  # for what it did not look at
                    while more := await reader.read(1000):
                        answers += more
            assert answers.count(b"HTTP/1.1 200 OK") == 1
            assert answers.endswith(b"here")
            writer.transport.abort()


@pytest.mark.anyio
async def test_who_takes_no_answer_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_MOST_CONNECTIONS", 12)
    monkeypatch.setattr(listening, "_SPARE_CONNECTIONS", 1)
    monkeypatch.setattr(listening, "REQUEST_SECONDS", 60.0)
    with bound() as listener:
        async with serving(Response(BODY), listener, lambda: None):
            held = [(await asks(listener))[1] for _ in range(11)]
            await asyncio.sleep(0.5)
            for one in held:
                one.write(ASKING)  # and its answer waits for the first to be taken
            await asyncio.sleep(0.5)
            reader, writer = await asks(listener)
            async with asyncio.timeout(30):
                assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            for one in (*held, writer):
                one.transport.abort()


@pytest.mark.anyio
async def test_who_holds_every_place_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies that never end, heads that never end, and answers after which nothing is asked."""
    monkeypatch.setattr(listening, "_MOST_CONNECTIONS", 12)
    begun = (
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
        b"GET / HTTP",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    )
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        async with serving(Response("here"), listener, lambda: None):
            held = []
            for number in range(18):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(begun[number % 3])
                held.append(writer)
                await asyncio.sleep(0.01)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(begun[2])
            async with asyncio.timeout(30):
                assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            for one in (*held, writer):
                one.close()


@pytest.mark.anyio
@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "an exception"])
async def test_nobody_is_answered_after_its_block_has_been_left_in_any_way(cancelled: bool) -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with anyio.CancelScope() as scope, contextlib.suppress(LookupError):
            async with serving(Response("here"), listener, lambda: None):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
                if not cancelled:
                    raise LookupError
                scope.cancel()
                await anyio.sleep_forever()
        async with asyncio.timeout(30):
            assert (await reader.read()).endswith(b"here")  # and is closed
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)


@pytest.mark.anyio
@pytest.mark.slow  # it waits for time to pass
async def test_who_takes_no_answer_is_let_go_at_the_end(
    lost: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "REQUEST_SECONDS", 600.0)
    with bound() as listener:
        async with serving(Response(BODY), listener, lambda: None):
            reader, writer = await asks(listener)
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            assert not lost.is_set()
        async with asyncio.timeout(30):
            await lost.wait()
        writer.transport.abort()
