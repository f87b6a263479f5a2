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
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.config.security import in_url, is_loopback
from agentweave_bus.exceptions import ConfigurationError

__all__ = ["LOOPBACK", "bind", "names_of", "serving"]

LOOPBACK: Final = "127.0.0.1"

REQUEST_SECONDS: Final = 5.0
"""For a whole request, its head and what follows it, however often something of it comes.

And for each part of an answer that has to wait for who asked to take what came before.
"""

_LEAST_TAKEN: Final = 16 * 1024
"""Bytes of such a part."""

_STREAM: Final = "agentweave.event_stream"
"""In a request's scope: its answer is a stream of events."""

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
            _noting_streams(app),
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


def _noting_streams(app: ASGIApp) -> ASGIApp:
    """Return ``app``, with a mark on each request that it answers with a stream of events."""

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                scope[_STREAM] = any(
                    name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message.get("headers", ())
                )
            await send(message)

        await app(scope, receive, noted)

    return noting


class _Impatient(H11Protocol):
    """Closes a connection on which a request does not come in time, or whose answers are not taken.

    When places run out a newcomer gets that of whoever has been there for longest and awaits no answer, or
    takes none: anybody on this machine can connect, and nobody can keep the others out by that. So of
    requests that come without an answer in between, only the first is answered: who sends thousands of them
    would always await one.

    A stream of events is sent as its own rule says, and this only ends what is left of it.
    """

    _due: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None
    _untaken = 0
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
        if self.conn.their_state is h11.DONE and self.conn.trailing_data[0]:
            self.cycle.keep_alive = False  # the next request is there already

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_taking()

    def resume_writing(self) -> None:
        self._stop_taking()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._stop_taking()
        super().connection_lost(exc)

    def _await_taking(self) -> None:
        self._untaken = self.transport.get_write_buffer_size()
        self._taking = self.loop.call_later(REQUEST_SECONDS, self._see_taken)

    def _see_taken(self) -> None:
        taken = self._untaken - self.transport.get_write_buffer_size()
        if taken >= _LEAST_TAKEN or self._streams():
            self._await_taking()
        else:
            self.transport.abort()  # to close it would wait for what is not taken

    def _streams(self) -> bool:
        return self._answers() and bool(self.cycle.scope.get(_STREAM)) and not self.transport.is_closing()

    def _awaited(self) -> bool:
        return self._answers() and (not self.flow.write_paused or self._streams())

    def _answers(self) -> bool:
        known = self.cycle is not None  # before the first request there is none
        return known and not self.cycle.response_complete

    def _make_room(self) -> None:
        others = (one for one in self.connections if isinstance(one, _Impatient) and one is not self)
        idle = [one for one in others if not one._awaited()]  # noqa: SLF001 - one of us
        if idle:
            min(idle, key=lambda one: one._came_at).transport.abort()  # noqa: SLF001 - one of us

    def _stop(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _stop_taking(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None


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
