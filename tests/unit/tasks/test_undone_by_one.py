"""A task that ended between two attempts is undone by one message of its queue, however often its frame comes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.tasks.test_refused_steps import CHARGED, REFUNDED, Shop, shop

__all__ = ["shop"]

pytestmark = pytest.mark.anyio


class Refunds:
    """Lets refunds begin, and end when the test lets go."""

    def __init__(self, shop: Shop) -> None:
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()
        self._refund = shop.paying.refund
        shop.paying.refund = self._wait  # type: ignore[method-assign]

    async def _wait(self, charged: Any) -> None:
        self.begun.set()
        await self.gate.wait()
        await self._refund(charged)

    async def are_under_way(self, shop: Shop) -> None:
        async with asyncio.timeout(60):
            while not self.begun.is_set():
                await shop.bus.clock.advance(1)


def queued(shop: Shop) -> tuple[str, bytes]:
    """The subject and the frame of the one task in the queue."""
    (message,) = shop.queue.values()
    return message.subject, message.data


async def submit_again(shop: Shop, subject: str, frame: bytes, times: int) -> None:
    """Publish the very frame again, as its sender, one copy after the other."""
    client = await shop.bus.client()
    assert client._parts is not None
    session = await client._parts.keeper.session(5)
    for _ in range(times):
        await session.publish(subject, frame)
        for _ in range(5):
            await shop.bus.clock.advance(0.05)  # so that it is looked at


async def test_what_no_pass_undoes_is_a_dead_letter(shop: Shop) -> None:
    await shop.between_attempts()
    await shop.allow(shop.pay(limits={"max_amount": 4}))
    shop.bank.busy = 10_000
    await shop.settled()
    assert shop.bank.asked == [CHARGED]
    (reason,) = shop.letters()
    assert reason.startswith("what its attempts did is not undone: ")
    assert "the compensation of step 'charge' failed" in reason


async def test_copies_that_come_while_it_is_being_undone(shop: Shop) -> None:
    refunds, handle = Refunds(shop), await shop.between_attempts()
    place = queued(shop)
    await handle.cancel()
    await refunds.are_under_way(shop)
    await submit_again(shop, *place, 6)
    refunds.gate.set()
    await shop.settled()
    assert [name for name, *_ in shop.bank.asked] == ["charge", "refund"]


async def test_copies_that_come_when_it_has_expired(shop: Shop) -> None:
    handle = await shop.between_attempts(deadline=50)
    place = queued(shop)
    refunds = Refunds(shop)
    await handle.cancel()
    for _ in range(60):
        await shop.bus.clock.advance(1)
    await submit_again(shop, *place, 6)
    refunds.gate.set()
    await shop.settled()
    assert shop.bank.asked == [CHARGED, REFUNDED]


async def test_copies_do_not_use_up_its_passes(shop: Shop) -> None:
    """While the bank is down for a moment, so that a pass fails at once."""
    handle = await shop.between_attempts()
    place = queued(shop)
    await shop.allow(shop.pay(limits={"max_amount": 4}))
    shop.bank.busy = 10_000
    async with asyncio.timeout(60):
        while (await handle.status()).state != "rejected":
            await shop.bus.clock.advance(1)
    await submit_again(shop, *place, 8)
    async with asyncio.timeout(60):
        while len(shop.queue) > 1:
            await shop.bus.clock.advance(0.05)
    shop.bank.busy = 0
    await shop.settled()
    assert shop.bank.asked == [CHARGED, REFUNDED]
