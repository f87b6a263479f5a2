"""Listening so that nothing is left behind: what was accepted is dropped, also what no handler has begun with.

A handler is a task. One that is cancelled before it has begun closes nothing, and its connection would be found
by the garbage collector, in some other test.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

__all__ = ["Accepted", "listening"]

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Accepted:
    """The connections of one listener. It is what ``create_server`` asks for a protocol."""

    def __init__(self, handle: Handler) -> None:
        self._handle = handle
        self._transports: list[asyncio.Transport] = []

    def __call__(self) -> asyncio.Protocol:
        return _Noted(self._handle, self._transports)

    def drop(self) -> None:
        """Break all of them."""
        for one in self._transports:
            one.abort()
        self._transports.clear()


class _Noted(asyncio.StreamReaderProtocol):
    def __init__(self, handle: Handler, transports: list[asyncio.Transport]) -> None:
        super().__init__(asyncio.StreamReader(), handle)
        self._transports = transports

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transports.append(cast("asyncio.Transport", transport))  # uvloop's is none by its type
        super().connection_made(transport)


@asynccontextmanager
async def listening(
    handle: Handler, host: str = "127.0.0.1", *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Listen on a free port, which is yielded, and drop at the end what is open still."""
    accepted = Accepted(handle)
    server = await asyncio.get_running_loop().create_server(accepted, host, 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()
        accepted.drop()
