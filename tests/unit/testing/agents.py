"""Agents for the tests of the testing tools."""

from __future__ import annotations

import asyncio
from typing import Any

from agentweave_bus import SecureAgent, TaskFailedError, capability, requires_peer

STOCK = "spiffe://test.local/agent/stock"


class StockAgent(SecureAgent):
    """Knows what is there, and shows its tests what happens to it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reserved: list[str] = []
        self.entered = asyncio.Event()
        self.gate = asyncio.Event()
        self.svids: list[Any] = []
        self.stopped = False

    async def on_stop(self) -> None:
        self.stopped = True

    async def on_svid_update(self, new_svid: Any) -> None:
        self.svids.append(new_svid)

    @capability("reserve")
    async def reserve(self, sku: str, quantity: int = 1) -> dict[str, Any]:
        if sku != "widget":
            raise TaskFailedError(f"no {sku} in stock")
        self.reserved.append(self.context.caller_spiffe_id)
        return {"reserved": quantity}

    @capability("look", safe=True)
    async def look(self) -> dict[str, Any]:
        return {"left": 3}

    @capability("wait")
    async def wait(self) -> dict[str, Any]:
        self.entered.set()
        await self.gate.wait()
        return {"waited": True}

    @capability("remaining")
    async def remaining(self) -> dict[str, Any]:
        return {"seconds": round(self.context.remaining(), 3)}

    @capability("recount")
    @requires_peer("spiffe://test.local/agent/*")
    async def recount(self) -> dict[str, Any]:
        return {}


class OrderAgent(SecureAgent):
    """Orders from stock."""

    @capability("create_order")
    async def create_order(self, sku: str, quantity: int = 1) -> dict[str, Any]:
        stock = await self.call_agent(STOCK, "reserve", {"sku": sku, "quantity": quantity})
        return {"ordered": stock.data["reserved"]}
