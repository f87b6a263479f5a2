"""docs/events.md: its agents run under its grants, and do what it says."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentweave_bus.testing import MemoryBus

PAGE = (Path(__file__).parents[3] / "docs" / "events.md").read_text()

pytestmark = pytest.mark.anyio


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not check():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.001)


async def test_the_page_runs(bus: MemoryBus) -> None:
    page: dict[str, Any] = {"__name__": "events"}
    exec(compile(block("python"), "events.md", "exec", dont_inherit=True), page)
    await bus.set_grants(yaml.safe_load(block("yaml")))
    order, shipping = await bus.start(page["OrderAgent"]), await bus.start(page["ShippingAgent"])
    screens = [await bus.start(page["ScreenAgent"], name="screen") for _ in range(2)]
    client = await bus.client()
    for order_id in ("o-1", "o-99"):
        await client.call(order.spiffe_id, "create_order", {"order_id": order_id, "amount": "9.99"})
    await until(lambda: shipping.packed == ["o-1"])
    for screen in screens:
        await until(lambda screen=screen: len(screen.shown) == 2)  # type: ignore[misc]
        assert screen.shown == ["order.created o-1", "order.created o-99"]
    await bus.clock.advance(5.1)
    await until(lambda: shipping.packed == ["o-1", "o-99"])
