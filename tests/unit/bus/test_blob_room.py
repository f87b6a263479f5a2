"""Room for large payloads: who waits, who need not, and that nobody has all of it."""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.bus.blob_room import BlobRoom
from agentweave_bus.spiffe_id import SpiffeID

pytestmark = pytest.mark.anyio

A, B, C = (SpiffeID(f"spiffe://x.test/agent/{name}") for name in "abc")


async def enter(room: BlobRoom, who: SpiffeID, size: int) -> bool:
    return await room.enter(who, size, wait_s=0.01)


async def test_one_sender_has_half_and_all_together_have_all() -> None:
    room = BlobRoom(100)
    assert await enter(room, A, 30)
    assert await enter(room, A, 20)
    assert not await enter(room, A, 1)
    assert await enter(room, B, 50)
    assert not await enter(room, C, 1)
    room.leave(A, 30)
    assert await enter(room, C, 30)


async def test_there_is_always_room_for_one() -> None:
    room = BlobRoom(10)
    assert await enter(room, A, 1_000)
    assert not await enter(room, B, 1)
    room.leave(A, 1_000)
    assert await enter(room, B, 8)
    assert await enter(room, A, 2)


async def test_who_waits_comes_in_when_somebody_leaves() -> None:
    room = BlobRoom(10)
    assert await enter(room, A, 10)
    waiting = [asyncio.create_task(room.enter(one, 5, wait_s=60)) for one in (B, C, A)]
    await asyncio.sleep(0)
    room.leave(A, 10)
    done, late = await asyncio.wait(waiting, timeout=1.0)
    assert (len(done), len(late)) == (2, 1)
    room.leave(B, 5)
    assert await asyncio.wait_for(next(iter(late)), 30)
