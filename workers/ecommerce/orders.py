"""The orders and where each of them stands.

An order is stored before anything is done for it, and with it until when somebody may be working on it. So
one that a call left half-way, whose agent died, is found again and undone. The states, and what leads from
one to the next::

    pending ── everything done ──> confirmed ── cancel ──> canceling ── undone ──> canceled
       └────── a step failed ───────────────────────────> failing ─── undone ──> failed
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from agentweave_bus.exceptions import TaskFailedError
from workers.ecommerce.database import Database, data_directory, utc_now
from workers.ecommerce.goods import Items

__all__ = ["Orders"]

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS orders (
    order_id TEXT PRIMARY KEY,
    request TEXT NOT NULL UNIQUE,
    user_id TEXT NOT NULL,
    items TEXT NOT NULL,
    total TEXT,
    payment_method TEXT NOT NULL,
    transaction_id TEXT,
    status TEXT NOT NULL,
    reason TEXT,
    worked_on_until TEXT NOT NULL,
    created_at TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS orders_of_user ON orders (user_id, created_at)"""

_LONGEST_SECONDS: Final = 31 * 86_400.0  # what a task may take at most
_UNDOING_TIME: Final = timedelta(seconds=30)
_UNDOING: Final = {"pending": "failing", "confirmed": "canceling"}
_UNDONE: Final = {"failing": "failed", "canceling": "canceled"}


class Orders:
    """The orders in ``orders.db``."""

    def __init__(self) -> None:
        self._database = Database(data_directory() / "orders.db", _SCHEMA)

    def add(
        self, request: str, user_id: str, items: Items, payment_method: str, *, seconds: float = 30.0
    ) -> dict[str, Any]:
        """Store a pending order; the same ``request`` again returns the order that it made.

        ``seconds`` is how long the request that asks for it may be worked on.
        """
        lines = json.dumps([item.to_json() for item in items])
        until = datetime.now(UTC) + timedelta(seconds=min(seconds, _LONGEST_SECONDS)) + _UNDOING_TIME
        with self._database.act() as rows:
            rows.execute(
                "INSERT INTO orders (order_id, request, user_id, items, payment_method, status,"
                " worked_on_until, created_at) VALUES (?, ?, ?, ?, ?, 'pending', ?, ?)"
                " ON CONFLICT (request) DO NOTHING",
                [str(uuid.uuid4()), request, user_id, lines, payment_method, _text(until), utc_now()],
            )
            return _order(rows.execute("SELECT * FROM orders WHERE request = ?", [request]).fetchone())

    def confirm(self, order_id: str, items: Any, total: str, transaction_id: str) -> dict[str, Any]:
        """Note that all is done, once. Refused when the order was given up meanwhile."""
        with self._database.act() as rows:
            rows.execute(
                "UPDATE orders SET status = 'confirmed', items = ?, total = ?, transaction_id = ?"
                " WHERE order_id = ? AND status = 'pending'",
                [json.dumps(items), total, transaction_id, order_id],
            )
            order = _order(_existing(rows, order_id))
        if order["status"] != "confirmed":
            raise TaskFailedError(f"Order {order_id} was given up")
        return order

    def give_up(self, order_id: str, reason: str) -> dict[str, Any]:
        """Note that the order is to be undone; harmless when it is being undone, or is undone, already."""
        with self._database.act() as rows:
            status = _existing(rows, order_id)["status"]
            if status in _UNDOING:
                rows.execute(
                    "UPDATE orders SET status = ?, reason = ? WHERE order_id = ?",
                    [_UNDOING[status], reason, order_id],
                )
            return _order(_existing(rows, order_id))

    def undone(self, order_id: str) -> dict[str, Any]:
        """Note that nothing of the order is left."""
        with self._database.act() as rows:
            status = _existing(rows, order_id)["status"]
            rows.execute(
                "UPDATE orders SET status = ? WHERE order_id = ?", [_UNDONE.get(status, status), order_id]
            )
            return _order(_existing(rows, order_id))

    def to_undo(self) -> Sequence[str]:
        """Return the ids of orders that wait to be undone, and of pending ones that nobody works on."""
        with self._database.look() as rows:
            found = rows.execute(
                "SELECT order_id FROM orders WHERE status IN ('failing', 'canceling')"
                " OR (status = 'pending' AND worked_on_until < ?) ORDER BY created_at LIMIT 100",
                [utc_now()],
            ).fetchall()
        return [row["order_id"] for row in found]

    def find(self, order_id: str) -> dict[str, Any]:
        """Return an order."""
        with self._database.look() as rows:
            return _order(_existing(rows, order_id))

    def of_user(self, user_id: str, limit: int) -> list[dict[str, Any]]:
        """Return a user's latest orders, newest first."""
        with self._database.look() as rows:
            found = rows.execute(
                "SELECT * FROM orders WHERE user_id = ? ORDER BY created_at DESC, order_id LIMIT ?",
                [user_id, limit],
            ).fetchall()
        return [_order(row) for row in found]


def _text(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds")  # as utc_now(), so that the two compare


def _existing(rows: sqlite3.Connection, order_id: str) -> sqlite3.Row:
    row: sqlite3.Row | None = rows.execute("SELECT * FROM orders WHERE order_id = ?", [order_id]).fetchone()
    if row is None:
        raise TaskFailedError(f"Order {order_id} not found")
    return row


def _order(row: sqlite3.Row) -> dict[str, Any]:
    keys = ("order_id", "user_id", "total", "payment_method", "transaction_id", "status", "created_at")
    order = {key: row[key] for key in keys} | {"items": json.loads(row["items"])}
    return order if row["reason"] is None else {**order, "reason": row["reason"]}
