"""FastStream on plain NATS: no TLS, no identity, no policy. What a popular framework costs beside its bus."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from faststream import FastStream
from faststream.nats import NatsBroker

from benchmarks.peers import Call, WrongAnswerError
from benchmarks.places import PAYLOAD, Place

__all__ = ["client", "serve"]

_SUBJECT: Final = "faststream.echo"
_CALL_S: Final = 30.0


async def serve(place: Place, ready: Callable[[], None]) -> None:
    """Answer every request with its own text, with FastStream's settings as they come.

    That includes the lines that it logs of every message, unless the row leaves them out.
    """
    broker = NatsBroker(place.address, **_options(place))

    @broker.subscriber(_SUBJECT)
    async def echo(text: str) -> str:
        return text

    app = FastStream(broker, **_options(place))
    app.after_startup(ready)
    await app.run()


@asynccontextmanager
async def client(place: Place) -> AsyncIterator[Call]:
    """Connect; each call is one request of the framework, its answer decoded."""
    async with NatsBroker(place.address, **_options(place)) as broker:

        async def call() -> None:
            reply = await broker.request(PAYLOAD, _SUBJECT, timeout=_CALL_S)
            if await reply.decode() != PAYLOAD:
                raise WrongAnswerError("faststream: another answer than was sent")

        yield call


def _options(place: Place) -> dict[str, Any]:
    return {"logger": None} if place.options["quiet"] else {}
