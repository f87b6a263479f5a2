"""The admin agent: the one that may change tiers and stock, and refund without an order's word."""

from __future__ import annotations

from typing import Any

from agentweave_bus import AgentCallError, SecureAgent, SpiffeID, TaskResult, capability
from workers.ecommerce.accounts import Tier
from workers.ecommerce.directory import INVENTORY, PAYMENT, USER
from workers.ecommerce.goods import Money, Sku

__all__ = ["AdminAgent"]


class AdminAgent(SecureAgent):
    """Does for operators what customers may not."""

    @capability("update_tier")
    async def update_tier(self, user_id: str, new_tier: Tier) -> TaskResult:
        """Change a customer's tier."""
        return await self._ask(USER, "update_tier", {"user_id": user_id, "new_tier": new_tier})

    @capability("change_stock")
    async def change_stock(self, sku: Sku, change: int, price: Money | None = None) -> TaskResult:
        """Add to an article's stock, or take from it."""
        return await self._ask(INVENTORY, "change_stock", {"sku": sku, "change": change, "price": price})

    @capability("refund")
    async def refund(self, order_id: str) -> TaskResult:
        """Give back what was charged for an order."""
        return await self._ask(PAYMENT, "refund", {"order_id": order_id})

    async def _ask(self, agent: SpiffeID, action: str, payload: dict[str, Any]) -> TaskResult:
        try:
            return await self.call_agent(agent, action, payload, timeout=10.0)
        except AgentCallError as error:
            return TaskResult(status="failed", error=str(error))
