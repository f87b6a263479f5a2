"""
Inventory Agent - Stock management, availability checks.

The reference names this agent and its two capabilities, and does not show it.
"""

import asyncio
from typing import Dict, Any, List

from agentweave_bus import SecureAgent, capability
from agentweave_bus.types import TaskResult, Message, DataPart


class InventoryAgent(SecureAgent):
    """Knows what is in stock."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._stock: Dict[str, int] = {"WIDGET-001": 5}

    @capability("check_availability")
    async def check_availability(self, items: List[Dict[str, Any]]) -> TaskResult:
        """Say whether all items are there."""
        for item in items:
            if self._stock.get(item["sku"], 0) < item["quantity"]:
                return TaskResult(status="failed", error=f"{item['sku']} is not available")
        return self._answer()

    @capability("reserve_items")
    async def reserve_items(self, order_id: str, items: List[Dict[str, Any]]) -> TaskResult:
        """Take the items out of stock."""
        for item in items:
            self._stock[item["sku"]] -= item["quantity"]
        return self._answer()

    def _answer(self) -> TaskResult:
        return TaskResult(
            status="completed",
            messages=[Message(role="assistant", parts=[DataPart(data={"stock": dict(self._stock)})])]
        )


async def main():
    agent = InventoryAgent.from_config("config/inventory.yaml")
    await agent.run()


if __name__ == "__main__":
    asyncio.run(main())
