"""Where the console may listen, and what requests call it there."""

from __future__ import annotations

import asyncio
import contextlib

import anyio
import pytest
from starlette.responses import Response

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
