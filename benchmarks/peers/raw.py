"""nats-py alone, on the same broker over the same mutual TLS: what any bus on NATS pays at least."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from benchmarks.peers import Call, WrongAnswerError
from benchmarks.places import PAYLOAD, Place

__all__ = ["client", "connected", "serve"]

_SUBJECT: Final = "raw.echo"
_CALL_S: Final = 30.0


async def serve(place: Place, ready: Callable[[], None]) -> None:
    """Answer every request with its own bytes."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

    async def answer(message: Msg) -> None:
        await message.respond(message.data)

    async with connected(place, "worker") as connection:
        await connection.subscribe(_SUBJECT, cb=answer)
        await connection.flush()
        ready()
        await stop.wait()


@asynccontextmanager
async def client(place: Place) -> AsyncIterator[Call]:
    """Connect; each call is one request of the library."""
    payload = PAYLOAD.encode()
    async with connected(place, "client") as connection:

        async def call() -> None:
            reply = await connection.request(_SUBJECT, payload, timeout=_CALL_S)
            if reply.data != payload:
                raise WrongAnswerError("raw: another answer than was sent")

        yield call


@asynccontextmanager
async def connected(place: Place, part: str) -> AsyncIterator[Client]:
    """Connect with an SVID from files. The broker shows an ID, no host name: its chain is checked."""
    context = ssl.create_default_context(cafile=place.options["authorities"])
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.load_cert_chain(place.options[f"{part}_certificate"], place.options[f"{part}_key"])
    connection = await nats.connect(
        place.address, tls=context, tls_hostname="127.0.0.1", tls_handshake_first=True
    )
    try:
        yield connection
    finally:
        await connection.close()
