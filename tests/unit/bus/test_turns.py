"""Messages that came together are taken up by sixteens."""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.bus.turns import Turns

pytestmark = pytest.mark.anyio


async def test_others_have_their_turn_after_every_sixteen():
    turns, order = Turns(), []

    async def take():
        for number in range(40):
            order.append(number)
            await turns.taken()

    async def other():
        for _ in range(2):
            order.append("other")
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(take())
        group.create_task(other())
    assert order == [*range(16), "other", *range(16, 32), "other", *range(32, 40)]
