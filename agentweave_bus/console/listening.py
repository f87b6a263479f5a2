"""Where the console listens, and what a request has to call that place."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Final

import anyio
import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.config.security import in_url, is_loopback
from agentweave_bus.exceptions import ConfigurationError

__all__ = ["LOOPBACK", "bind", "names_of", "serving"]

LOOPBACK: Final = "127.0.0.1"

REQUEST_SECONDS: Final = 5.0
"""For a whole request, its head and what follows it, however often something of it comes."""

_MOST_CONNECTIONS: Final = 64
_SPARE_CONNECTIONS: Final = 8
"""Room is made from when on so few places are left: who was sent away is still counted for a moment."""

_MOST_HEADER_BYTES: Final = 16 * 1024
_END_S: Final = 2
_SURELY_ENDED_S: Final = 5.0
"""By when the listener has ended, with all that it waits for; it is only given up then."""


def bind(host: str, port: int) -> socket.socket:
    """Listen on an address; port 0 takes a free one.

    Raises:
        ConfigurationError: it can't be, or it stands for every address of the machine.

    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigurationError(
            f"--host {host!r} is no address of this machine: {error.strerror}.", key="--host"
        ) from error
    if ipaddress.ip_address(address[0]).is_unspecified:
        raise ConfigurationError(
            f"--host {host!r} stands for every address.",
            key="--host",
            hint="Name the one at which browsers reach the console: requests have to name it, too.",
        )
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(_MOST_CONNECTIONS)
    except OSError as error:
        made.close()
        raise ConfigurationError(
            f"The console can't listen on {host}:{port}: {error.strerror}.",
            key="--port",
            hint="Choose another --port, or none for any free one.",
        ) from error
    return made


def names_of(host: str, port: int) -> tuple[str, frozenset[str]]:
    """Return the address to open, and all ``Host`` headers that mean it."""
    shown = in_url(host).lower()
    names = {shown, "localhost"} if is_loopback(host) else {shown}
    hosts = {f"{name}:{port}" for name in names} | (names if port == 80 else set())  # noqa: PLR2004 - of HTTP
    return f"http://{shown}:{port}/", frozenset(hosts)


@asynccontextmanager
async def serving(
    app: ASGIApp, listener: socket.socket, before_end: Callable[[], None]
) -> AsyncIterator[None]:
    """Serve for the length of the block. ``before_end`` has what would go on for ever end.

    Nobody is answered any more once it is left, however it is: the listener closes by itself, and is waited
    for.
    """
    server = _Server(
        uvicorn.Config(
            app,
            loop="none",
            http=_Impatient,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=_END_S,
            h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
        )
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    unhurried = anyio.CancelScope(shield=True)

    async def serve() -> None:
        with unhurried:  # cancelled with the block it would leave the listener open
            await server.serve([listener])
        for one in tuple(server.server_state.connections):
            one.transport.abort()  # of who does not take what it is sent; that would wait for ever

    async with owned_tasks() as group:
        group.start_soon(serve)
        try:
            await server.listening.wait()
            yield
        finally:
            server.should_exit = True
            unhurried.deadline = anyio.current_time() + _SURELY_ENDED_S
            before_end()


class _Impatient(H11Protocol):
    """Closes a connection on which a request does not come in time.

    When places run out a newcomer gets that of whoever has been there for longest and awaits no answer:
    anybody on this machine can connect, and nobody can keep the others out by that.
    """

    _due: asyncio.TimerHandle | None = None
    _came_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._came_at = self.loop.time()
        self._due = self.loop.call_later(REQUEST_SECONDS, transport.close)
        if len(self.connections) > _MOST_CONNECTIONS - _SPARE_CONNECTIONS:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state not in {h11.IDLE, h11.SEND_BODY}:
            self._stop()
        elif self._due is None:
            self._due = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _make_room(self) -> None:
        others = (one for one in self.connections if isinstance(one, _Impatient) and one is not self)
        idle = [one for one in others if one.cycle is None or one.cycle.response_complete]
        if idle:
            min(idle, key=lambda one: one._came_at).transport.abort()  # noqa: SLF001 - one of us

    def _stop(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs it, and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
