"""Places: so many at once, half of them for one caller, and nobody waits without bound."""

from __future__ import annotations

import anyio
import pytest

from agentweave_bus.bus.occupancy import Occupancy
from agentweave_bus.spiffe_id import SpiffeID

pytestmark = pytest.mark.anyio

A, B, C = (SpiffeID(f"spiffe://x.test/agent/{name}") for name in "abc")


class Crowd:
    def __init__(self, places):
        self.room = Occupancy(places)
        self.inside = []
        self.refused = []

    async def come(self, caller):
        if await self.room.enter(caller, 1):
            self.inside.append(caller)
        else:
            self.refused.append(caller)

    async def go(self, caller):
        self.inside.remove(caller)
        self.room.leave(caller, 1)
        await anyio.wait_all_tasks_blocked()


async def crowded(group, crowd, *callers):
    for caller in callers:
        group.start_soon(crowd.come, caller)
    await anyio.wait_all_tasks_blocked()


async def test_one_caller_gets_half_and_others_find_room():
    crowd = Crowd(4)
    async with anyio.create_task_group() as group:
        await crowded(group, crowd, *[A] * 6)
        assert crowd.inside == [A, A]
        await crowded(group, crowd, B, C, B)
        assert sorted(crowd.inside) == [A, A, B, C]
        await crowd.go(C)
        assert sorted(crowd.inside) == [A, A, B, B]
        await crowd.go(A)
        assert sorted(crowd.inside) == [A, A, B, B]  # the next of those who waited
        group.cancel_scope.cancel()


async def test_who_waits_too_often_is_told_to_come_again():
    crowd = Crowd(2)
    async with anyio.create_task_group() as group:
        await crowded(group, crowd, *[A] * 5)
        assert (crowd.inside, crowd.refused) == ([A], [A])  # one inside, three wait, of eight that fit in
        await crowd.go(A)
        await crowded(group, crowd, A)
        assert (crowd.inside, crowd.refused) == ([A], [A])
        group.cancel_scope.cancel()


async def test_who_stops_waiting_leaves_no_trace():
    crowd = Crowd(2)
    async with anyio.create_task_group() as group:
        await crowded(group, crowd, *[A] * 4)
        group.cancel_scope.cancel()
    await crowd.go(A)
    assert crowd.room._callers == {}
    async with anyio.create_task_group() as group:
        await crowded(group, crowd, A, B)
    assert sorted(crowd.inside) == [A, B]


async def test_one_caller_gets_half_of_the_bytes_and_all_together_no_more_than_all():
    room = Occupancy(8, max_bytes=100)
    assert await room.enter(A, 30)
    assert await room.enter(A, 20)
    assert not await room.enter(A, 1)
    assert await room.enter(B, 49)
    assert not await room.enter(B, 2)
    assert not await room.enter(C, 2)
    assert set(room._callers) == {A, B}  # who is refused is not remembered
    assert await room.enter(C, 1)
    for caller, size in ((A, 30), (A, 20), (B, 49), (C, 1)):
        room.leave(caller, size)
    assert room._callers == {}
    assert await room.enter(A, 1000)  # one is taken in, whatever its size
    room.leave(A, 1000)
    assert room._bytes == 0
