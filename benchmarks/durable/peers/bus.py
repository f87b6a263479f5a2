"""This project: a worker as anyone would start it, and a client that submits to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, Final

from agentweave_bus import SecureAgent, capability
from agentweave_bus.config import load_config
from agentweave_bus.runtime import AgentWeaveClient
from agentweave_bus.worker import serve as serve_agent
from benchmarks.durable.rows import AT_ONCE
from benchmarks.durable.stamps import StampReader, StampWriter, stamped
from benchmarks.places import PAYLOAD, Place

__all__ = ["NoOp", "client", "serve"]

_HELD_S: Final = 86_400.0
"""How long a handler may wait for the gate: longer than any run."""
_LIMIT_S: Final = 30.0


class _Parts:
    """What the handlers of this process have in common; set before any runs."""

    gate: asyncio.Event
    starts: StampWriter
    cancels: StampWriter


class NoOp(SecureAgent):
    """Does nothing, as a durable task."""

    @capability("noop", timeout=_HELD_S, concurrency=AT_ONCE)
    async def noop(self, text: str) -> dict[str, Any]:
        """Return at once, when the gate is open."""
        del text
        await _Parts.gate.wait()
        return {}

    @capability("stamped")
    async def stamped(self, text: str) -> dict[str, Any]:
        """Write down how long ago the task was submitted."""
        _Parts.starts.since(text)
        return {}

    @capability("hang")
    async def hang(self) -> dict[str, Any]:
        """Run until it is cancelled, and write down when it began and when that was."""
        _Parts.cancels.now()
        try:
            await asyncio.Event().wait()
        finally:
            _Parts.cancels.now()
        return {}


async def serve(place: Place, gate: asyncio.Event, ready: Callable[[], None]) -> None:
    """Serve :class:`NoOp`; the worker itself says on its pipe that it is ready."""
    del ready
    _Parts.gate = gate
    _Parts.starts, _Parts.cancels = (StampWriter(place.options[one]) for one in ("starts", "cancels"))
    await serve_agent(Path(place.options["worker_config"]), class_path="benchmarks.durable.peers.bus:NoOp")


class _Client:
    def __init__(self, bus: AgentWeaveClient, place: Place) -> None:
        self._bus = bus
        self._place = place
        self._cancels = StampReader(place.options["cancels"])

    def _target(self, queue: str) -> str:
        return self._place.options[f"target_{queue}"]

    async def submit(self, queue: str, count: int) -> None:
        async for _ in self._bus.submit_many(self._target(queue), "noop", repeat({"text": PAYLOAD}, count)):
            pass

    async def submit_stamped(self, queue: str) -> None:
        await self._bus.submit(self._target(queue), "stamped", {"text": stamped()})

    async def cancel(self, queue: str) -> float:
        self._cancels.skip()
        handle = await self._bus.submit(self._target(queue), "hang")
        await self._cancels.next(1, _LIMIT_S)
        began = time.monotonic_ns()
        await handle.cancel("enough")
        (felt,) = await self._cancels.next(1, _LIMIT_S)
        return (felt - began) / 1e9


@asynccontextmanager
async def client(place: Place) -> AsyncIterator[_Client]:
    """Connect as the benchmark's client."""
    async with AgentWeaveClient(load_config(Path(place.options["client_config"]))) as bus:
        yield _Client(bus, place)
