"""Identities that a test makes itself, connections that know no rules, and waiting for what they bring."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg

from agentweave_bus.envelope import (
    Sealer,
)
from agentweave_bus.identity import (
    IdentityProvider,
    IdentitySource,
    X509Bundle,
    X509Svid,
)
from tests.integration.probes import PATIENCE


class Fixed(IdentityProvider):
    """An identity that the test makes itself: expired soon, from another domain, or anybody's."""

    def __init__(self, svid: X509Svid, *bundles: X509Bundle) -> None:
        self.svid = svid
        self.bundles = {one.trust_domain: one for one in bundles}
        self._changed = asyncio.Event()

    async def get_svid(self) -> X509Svid:
        return self.svid

    async def get_trust_bundle(self, trust_domain: str) -> X509Bundle:
        return self.bundles[trust_domain]

    def get_spiffe_id(self) -> str:
        return str(self.svid.spiffe_id)

    async def wait_for_update(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def replace(self, svid: X509Svid) -> None:
        self.svid = svid
        self._changed.set()


class Raw:
    """A connection to the broker that knows no rules: what somebody with an SVID and a library can do."""

    def __init__(self, client: NatsClient, source: IdentitySource) -> None:
        self.client = client
        self.source = source
        self.sealer = Sealer(lambda: source.svid)
        self.refused: list[str] = []
        self.refusal = asyncio.Event()

    async def listen(self, subject: str) -> asyncio.Queue[Msg]:
        heard: asyncio.Queue[Msg] = asyncio.Queue()

        async def received(message: Msg) -> None:
            heard.put_nowait(message)

        await self.client.subscribe(subject, cb=received)
        await self.flush()
        return heard

    async def flush(self) -> None:
        """Wait until the broker has everything. Twice: the library's ping overtakes its own buffer."""
        await self.client.flush()
        await self.client.flush()

    async def send(
        self, subject: str, data: bytes, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        await self.client.publish(subject, data, reply, headers)
        await self.flush()

    async def denied(self, act: Awaitable[Any]) -> str:
        """Do something and return what the broker says against it."""
        self.refusal.clear()
        await act
        async with asyncio.timeout(PATIENCE):
            await self.refusal.wait()
        return self.refused[-1]


async def heard_within(queue: asyncio.Queue[Msg], what: str = "message") -> Msg:
    """The next message; missing it is a failure."""
    try:
        async with asyncio.timeout(PATIENCE):
            return await queue.get()
    except TimeoutError:
        raise AssertionError(f"no {what} within {PATIENCE:g} s") from None


async def until(check: Callable[[], bool], what: str, seen: Callable[[], object] = lambda: "") -> None:
    """Wait for something that announces itself to nobody, such as a file or a counter.

    ``seen`` tells what there was instead, where it does not come.
    """
    give_up = time.monotonic() + PATIENCE
    while not check():
        assert time.monotonic() < give_up, f"{what}: not within {PATIENCE:g} s {seen()}"
        await asyncio.sleep(0.01)
