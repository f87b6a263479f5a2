"""A TCP proxy in front of the broker: a network that a test can stop, slow down or cut, each way apart.

Held bytes are not lost, as in a partition that heals: they arrive when it does, unless the connection has
been given up by then.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.listening import listening

_CHUNK = 16 * 1024
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


@dataclass
class Way:
    """One direction of every connection through the proxy."""

    delay_s: float = 0.0
    bytes_per_s: float = math.inf
    cut_after: int | None = None
    """So many bytes are let through, then the connection is reset."""
    passed: int = 0
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._open.set()

    def hold(self) -> None:
        """Let nothing through, and say nothing about it."""
        self._open.clear()

    def let_go(self) -> None:
        self._open.set()

    async def take(self, data: bytes) -> bytes:
        """Return what of ``data`` gets through, when it does."""
        await asyncio.sleep(self.delay_s + len(data) / self.bytes_per_s)
        await self._open.wait()
        if self.cut_after is not None:
            data = data[: self.cut_after]
            self.cut_after -= len(data)
        self.passed += len(data)
        return data

    @property
    def cuts_now(self) -> bool:
        return self.cut_after == 0


class Proxy:
    """Made by :func:`proxied`. ``up`` leads to the broker, ``down`` from it."""

    def __init__(self, target: int) -> None:
        self.up, self.down = Way(), Way()
        self.url = ""
        self.port = 0
        self.accepted = 0
        self._target = target
        self._links: set[asyncio.Task[None]] = set()
        self._ends: set[asyncio.StreamWriter] = set()

    @property
    def ways(self) -> tuple[Way, Way]:
        return self.up, self.down

    def hold(self) -> None:
        for way in self.ways:
            way.hold()

    def let_go(self) -> None:
        for way in self.ways:
            way.let_go()

    async def accept(self, near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        task.add_done_callback(self._links.discard)
        try:
            far, to_far = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:  # the broker is away
            to_near.close()
            return
        ends = (to_near, to_far)
        self._ends.update(ends)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(near, to_far, self.up, ends))
                group.create_task(_pump(far, to_near, self.down, ends))
        finally:
            self._ends.difference_update(ends)
            for end in ends:
                end.transport.abort()

    async def aclose(self) -> None:
        for end in self._ends:
            end.transport.abort()
        self.let_go()
        await asyncio.gather(*self._links, return_exceptions=True)


async def _pump(
    source: asyncio.StreamReader,
    sink: asyncio.StreamWriter,
    way: Way,
    ends: tuple[asyncio.StreamWriter, ...],
) -> None:
    try:
        while data := await source.read(_CHUNK):
            sink.write(await way.take(data))
            await sink.drain()
            if way.cuts_now:
                way.cut_after = None
                await asyncio.sleep(0.02)  # what was let through arrives before the reset
                for end in ends:
                    _reset(end)
                return
        await way.take(b"")
        sink.close()
    except OSError:
        for end in ends:
            end.transport.abort()


def _reset(end: asyncio.StreamWriter) -> None:
    end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
    end.transport.abort()


@asynccontextmanager
async def proxied(port: int, *, host: str = "127.0.0.1") -> AsyncIterator[Proxy]:
    """Open a proxy to ``port`` of this machine on a free port of ``host``."""
    proxy = Proxy(port)
    try:
        async with listening(proxy.accept, host) as proxy.port:
            proxy.url = f"tls://{host}:{proxy.port}"
            yield proxy
    finally:
        await proxy.aclose()
