"""nats-py alone, on the same broker over the same mutual TLS: what any bus on NATS pays at least."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from agentweave_bus.identity import IdentitySource, SPIFFEIdentityProvider, client_context
from agentweave_bus.spiffe_id import SpiffeID
from benchmarks.peers import Call
from benchmarks.places import PAYLOAD, Place

__all__ = ["client", "serve"]

_SUBJECT: Final = "raw.echo"
_CALL_S: Final = 30.0


async def serve(place: Place, ready: Callable[[], None]) -> None:
    """Answer every request with its own bytes."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

    async def answer(message: Msg) -> None:
        await message.respond(message.data)

    async with _connected(place) as connection:
        await connection.subscribe(_SUBJECT, cb=answer)
        await connection.flush()
        ready()
        await stop.wait()


@asynccontextmanager
async def client(place: Place) -> AsyncIterator[Call]:
    """Connect; each call is one request of the library."""
    payload = PAYLOAD.encode()
    async with _connected(place) as connection:

        async def call() -> None:
            reply = await connection.request(_SUBJECT, payload, timeout=_CALL_S)
            if reply.data != payload:
                raise RuntimeError("raw: another answer than was sent")

        yield call


@asynccontextmanager
async def _connected(place: Place) -> AsyncIterator[Client]:
    """Connect with an SVID, as this project's own processes do, and with their TLS settings."""
    me = SpiffeID(os.environ["BENCH_ID"])
    source = IdentitySource(SPIFFEIdentityProvider(os.environ["BENCH_ENDPOINT"], me), expected_id=me)
    await source.start(10.0)
    try:
        connection = await nats.connect(
            place.address,
            tls=client_context(source, SpiffeID(os.environ["BENCH_SERVER_ID"])),
            tls_hostname="127.0.0.1",
            tls_handshake_first=True,
        )
        try:
            yield connection
        finally:
            await connection.close()
    finally:
        await source.aclose()
