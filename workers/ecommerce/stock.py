"""The stock: what is on the shelves, and what is reserved for which order.

Reserving and releasing are keyed by the order, so doing either twice does it once. An order that was
released before it was reserved can't be reserved any more: a reservation that was on its way when its
order was given up finds that out when it arrives.
"""

from __future__ import annotations

import json
import sqlite3
from decimal import Decimal
from typing import Any, Final

from agentweave_bus.exceptions import TaskFailedError
from workers.ecommerce.database import Database, data_directory, utc_now
from workers.ecommerce.goods import Items, quantities

__all__ = ["Stock"]

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS articles (
    sku TEXT PRIMARY KEY,
    price TEXT NOT NULL,
    available INTEGER NOT NULL CHECK (available >= 0)
);
CREATE TABLE IF NOT EXISTS reservations (
    order_id TEXT PRIMARY KEY,
    lines TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('reserved', 'released')),
    changed_at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS changes (
    request TEXT PRIMARY KEY,
    sku TEXT NOT NULL,
    change INTEGER NOT NULL,
    changed_at TEXT NOT NULL
);
INSERT OR IGNORE INTO articles VALUES ('WIDGET-001', '19.99', 100), ('GADGET-002', '249.00', 10)"""


class Stock:
    """The stock in ``inventory.db``. A new shop begins with a hundred widgets and ten gadgets."""

    def __init__(self) -> None:
        self._database = Database(data_directory() / "inventory.db", _SCHEMA)

    def check(self, items: Items) -> dict[str, Any]:
        """Return what the items cost, if there is enough of each at the price that the customer saw."""
        with self._database.look() as rows:
            prices = {sku: _enough(rows, sku, count) for sku, count in quantities(items).items()}
        for item in items:
            if item.price is not None and item.price != prices[item.sku]:
                raise TaskFailedError(f"{item.sku} costs {prices[item.sku]}, not {item.price}")
        lines = [{"sku": item.sku, "quantity": item.quantity, "price": prices[item.sku]} for item in items]
        return {"items": lines, "total": sum((prices[i.sku] * i.quantity for i in items), Decimal(0))}

    def reserve(self, order_id: str, items: Items) -> dict[str, Any]:
        """Take the items off the shelf for an order, all of them or none."""
        wanted = quantities(items)
        with self._database.act() as rows:
            if (made := _reservation(rows, order_id)) is not None:
                if made["status"] == "released":
                    raise TaskFailedError(f"Order {order_id} was given up; nothing is reserved for it")
                return _told(made)
            for sku, count in wanted.items():
                _enough(rows, sku, count)
                _move(rows, sku, -count)
            rows.execute(
                "INSERT INTO reservations VALUES (?, ?, 'reserved', ?)",
                [order_id, json.dumps(wanted), utc_now()],
            )
            return {"order_id": order_id, "reserved": wanted, "status": "reserved"}

    def release(self, order_id: str) -> dict[str, Any]:
        """Put what was reserved for an order back, once."""
        with self._database.act() as rows:
            made = _reservation(rows, order_id)
            if made is not None and made["status"] == "released":
                return _told(made)
            lines: dict[str, int] = {} if made is None else json.loads(made["lines"])
            for sku, count in lines.items():
                _move(rows, sku, count)
            rows.execute(
                "INSERT INTO reservations VALUES (?, ?, 'released', ?)"
                " ON CONFLICT (order_id) DO UPDATE SET status = 'released', changed_at = excluded.changed_at",
                [order_id, json.dumps(lines), utc_now()],
            )
            return {"order_id": order_id, "reserved": lines, "status": "released"}

    def change(self, request: str, sku: str, change: int, price: Decimal | None) -> dict[str, Any]:
        """Add to the stock of an article or take from it, once a ``request``; a price makes a new one."""
        with self._database.act() as rows:
            if rows.execute("SELECT 1 FROM changes WHERE request = ?", [request]).fetchone() is None:
                if price is not None:
                    rows.execute(
                        "INSERT INTO articles VALUES (?, ?, 0)"
                        " ON CONFLICT (sku) DO UPDATE SET price = excluded.price",
                        [sku, str(price)],
                    )
                if _article(rows, sku)["available"] + change < 0:
                    raise TaskFailedError(f"There are fewer than {-change} of {sku}")
                _move(rows, sku, change)
                rows.execute("INSERT INTO changes VALUES (?, ?, ?, ?)", [request, sku, change, utc_now()])
            return _described(_article(rows, sku))

    def articles(self) -> list[dict[str, Any]]:
        """Return every article with its price and what is available of it."""
        with self._database.look() as rows:
            return [_described(row) for row in rows.execute("SELECT * FROM articles ORDER BY sku")]


def _article(rows: sqlite3.Connection, sku: str) -> sqlite3.Row:
    row: sqlite3.Row | None = rows.execute("SELECT * FROM articles WHERE sku = ?", [sku]).fetchone()
    if row is None:
        raise TaskFailedError(f"There is no article {sku}")
    return row


def _enough(rows: sqlite3.Connection, sku: str, count: int) -> Decimal:
    article = _article(rows, sku)
    if article["available"] < count:
        raise TaskFailedError(f"{count} of {sku} are wanted, {article['available']} are there")
    return Decimal(article["price"])


def _move(rows: sqlite3.Connection, sku: str, change: int) -> None:
    rows.execute("UPDATE articles SET available = available + ? WHERE sku = ?", [change, sku])


def _reservation(rows: sqlite3.Connection, order_id: str) -> sqlite3.Row | None:
    row: sqlite3.Row | None = rows.execute(
        "SELECT * FROM reservations WHERE order_id = ?", [order_id]
    ).fetchone()
    return row


def _told(reservation: sqlite3.Row) -> dict[str, Any]:
    return {
        "order_id": reservation["order_id"],
        "reserved": json.loads(reservation["lines"]),
        "status": reservation["status"],
    }


def _described(article: sqlite3.Row) -> dict[str, Any]:
    return {"sku": article["sku"], "price": article["price"], "available": article["available"]}
