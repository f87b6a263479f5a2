"""For how long a puller has asked for nothing although it has room: what tells a deaf worker from a busy one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentweave_bus.tasks.pulling import Puller
from agentweave_bus.tasks.queue import Delivery

pytestmark = pytest.mark.anyio

DELIVERY = Delivery(b"", "s", 1, 0, "a")


class Deaf(Puller):
    """Asks for nothing, whatever it has room for."""

    async def _pull_on(self, session: Any, over: asyncio.Future[None]) -> None:
        raise NotImplementedError


async def test_who_has_little_room_is_busy_and_not_deaf() -> None:
    gate = asyncio.Semaphore(0)

    async def perform(_: Delivery) -> None:
        await gate.acquire()

    async def announce(_: Any) -> None:
        raise NotImplementedError

    puller = Deaf(
        "spiffe://a.test/agent/x", "x", keeper=None, concurrency=8, perform=perform,
        announce=announce, monotonic=lambda: 0.0,
    )  # type: ignore[arg-type]  # fmt: skip
    async with asyncio.TaskGroup() as group:
        puller._group = group
        for _ in range(6):
            await puller._take(DELIVERY)
        assert puller.idle_s is not None  # two places are a quarter: it should ask
        await puller._take(DELIVERY)
        assert puller.idle_s is None
        puller._asked_at -= 1000  # it has been busy for long
        gate.release()
        async with asyncio.timeout(30):
            while puller.running == 7:  # noqa: ASYNC110 - tasks end in their own time
                await asyncio.sleep(0)
        assert puller.idle_s is not None
        assert puller.idle_s < 100  # counted from when there was room again
        for _ in range(6):
            gate.release()
