"""Workload APIs that misbehave, on real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from spiffe._proto import workload_pb2

from agentweave_bus.embedded.workload_api import WorkloadApiServer
from agentweave_bus.identity import X509Svid
from tests.integration.world import World

Play = Callable[[Any], Any]
"""Makes what the API says out of the honest message."""


class PlayedApi(WorkloadApiServer):
    """A Workload API of the stack's authority that says what the test wants."""

    play: Play | None = None

    def svid_response(self, served: Any) -> Any:
        honest = super().svid_response(served)
        return honest if self.play is None else self.play(honest)

    def says(self, play: Play | None) -> None:
        """Say something else from now on, to those who listen, too."""
        self.play = play
        self.announce()


def instead(svid: X509Svid) -> Play:
    """Say the SVID of somebody else."""
    return lambda honest: workload_pb2.X509SVIDResponse(
        svids=[
            workload_pb2.X509SVID(
                spiffe_id=svid.spiffe_id,
                x509_svid=b"".join(svid.cert_chain),
                x509_svid_key=svid.key_der(),
                bundle=honest.svids[0].bundle,
            )
        ]
    )


def garbled(field: str) -> Play:
    """Say bytes without meaning in one field."""

    def play(honest: Any) -> Any:
        setattr(honest.svids[0], field, b"\x30\x82\xff" + bytes(range(64)))
        return honest

    return play


def nothing(_honest: Any) -> Any:
    return workload_pb2.X509SVIDResponse()


@asynccontextmanager
async def played_api(
    world: World, folder: Path, lifetime: timedelta = timedelta(hours=1)
) -> AsyncIterator[PlayedApi]:
    async with PlayedApi(world.stack.api.authority, folder / "sockets", lifetime=lifetime) as api:
        yield api


@asynccontextmanager
async def mute(endpoint: str) -> AsyncIterator[None]:
    """Accept every connection to a socket and never say a word."""
    held: list[asyncio.StreamWriter] = []

    async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    path = Path(endpoint.removeprefix("unix://"))
    server = await asyncio.start_unix_server(accept, path)
    try:
        yield
    finally:
        server.close()
        for writer in held:
            writer.transport.abort()
        await server.wait_closed()
