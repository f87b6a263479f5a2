"""The inventory agent: what there is, and what is reserved. Asks nobody."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from agentweave_bus import SecureAgent, capability
from workers.ecommerce.asking import request_key
from workers.ecommerce.goods import Items, Money, Sku
from workers.ecommerce.stock import Stock

__all__ = ["InventoryAgent"]

Change = Annotated[int, Field(ge=-100_000, le=100_000)]


class InventoryAgent(SecureAgent):
    """Manages the stock."""

    def on_start(self) -> None:
        """Open the stock."""
        self._stock = Stock()

    @capability("check_availability", safe=True)
    def check_availability(self, items: Items) -> dict[str, Any]:
        """Say what the items cost, if all are there; a price that the customer saw must be the true one."""
        return self._stock.check(items)

    @capability("list_articles", safe=True)
    def list_articles(self) -> dict[str, Any]:
        """List the articles with their prices and what is available of each."""
        return {"articles": self._stock.articles()}

    @capability("reserve_items")
    def reserve_items(self, order_id: str, items: Items) -> dict[str, Any]:
        """Reserve all the items for an order, or none."""
        reserved = self._stock.reserve(order_id, items)
        self.logger.info("reserved", extra={"order_id": order_id})
        return reserved

    @capability("release_items")
    def release_items(self, order_id: str) -> dict[str, Any]:
        """Put back what was reserved for an order."""
        return self._stock.release(order_id)

    @capability("change_stock")
    def change_stock(self, sku: Sku, change: Change, price: Money | None = None) -> dict[str, Any]:
        """Add to an article's stock, or take from it; with a price also for an article that is new."""
        result = self._stock.change(request_key(), sku, change, price)
        self.logger.info("stock changed", extra={"sku": sku, "change": change})
        return result
