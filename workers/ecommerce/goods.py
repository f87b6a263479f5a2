"""What is ordered: lines of goods, and money. The types say what an agent accepts."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Item", "Items", "Money", "Sku", "quantities"]

Money: TypeAlias = Annotated[Decimal, Field(gt=0, max_digits=12, decimal_places=2)]
"""An amount of the shop's one currency, to the cent. On the wire it is a text such as ``"39.98"``."""

Sku: TypeAlias = Annotated[str, Field(pattern=r"^[A-Z0-9][A-Z0-9-]{0,31}$")]
"""The name of an article, such as ``WIDGET-001``."""


class Item(BaseModel):
    """One line: an article, how many, and the price that the customer saw, if it says so."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sku: Sku
    quantity: Annotated[int, Field(ge=1, le=1000)]
    price: Money | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the line as JSON."""
        return self.model_dump(mode="json", exclude_none=True)


Items: TypeAlias = Annotated[list[Item], Field(min_length=1, max_length=50)]


def quantities(items: Items) -> dict[str, int]:
    """Return how many of each article, an article that stands on several lines added up."""
    wanted: dict[str, int] = {}
    for item in items:
        wanted[item.sku] = wanted.get(item.sku, 0) + item.quantity
    return wanted
