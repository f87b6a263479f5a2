"""The payments: one for an order, charged once and refunded at most once, whoever asks how often.

With each stands on whose behalf it was asked for: the proved chain of requests and the principal that its
origin named. A refund for an order that was never charged is kept, too: a charge that was on its way
when its order was given up is then refused.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

from agentweave_bus.exceptions import TaskFailedError
from workers.ecommerce.database import Database, data_directory, utc_now

__all__ = ["Payments"]

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS payments (
    order_id TEXT PRIMARY KEY,
    transaction_id TEXT UNIQUE,
    user_id TEXT,
    amount TEXT,
    payment_method TEXT,
    status TEXT NOT NULL CHECK (status IN ('paid', 'refunded', 'void')),
    asked_by TEXT,
    changed_at TEXT NOT NULL
)"""


class Payments:
    """The payments in ``payments.db``."""

    def __init__(self) -> None:
        self._database = Database(data_directory() / "payments.db", _SCHEMA)

    def charge(
        self, order_id: str, user_id: str, amount: Decimal, payment_method: str, asked_by: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Charge for an order; the same charge again returns the payment that was made."""
        with self._database.act() as rows:
            if (made := _find(rows, order_id)) is not None:
                return _same(made, user_id, amount)
            rows.execute(
                "INSERT INTO payments VALUES (?, ?, ?, ?, ?, 'paid', ?, ?)",
                [
                    order_id,
                    f"txn-{uuid.uuid4()}",
                    user_id,
                    str(amount),
                    payment_method,
                    json.dumps(asked_by),
                    utc_now(),
                ],
            )
            return _payment(_existing(rows, order_id))

    def refund(self, order_id: str) -> dict[str, Any]:
        """Give the money back, once. Where nothing was charged, nothing can be charged afterwards."""
        with self._database.act() as rows:
            rows.execute(
                "INSERT INTO payments (order_id, status, changed_at) VALUES (?, 'void', ?)"
                " ON CONFLICT (order_id) DO UPDATE SET status = 'refunded', changed_at = excluded.changed_at"
                " WHERE status = 'paid'",
                [order_id, utc_now()],
            )
            return _payment(_existing(rows, order_id))

    def find(self, order_id: str) -> dict[str, Any]:
        """Return the payment for an order."""
        with self._database.look() as rows:
            return _payment(_existing(rows, order_id))

    def charged(self) -> Decimal:
        """Return the sum of what is paid and not refunded."""
        with self._database.look() as rows:
            amounts = rows.execute("SELECT amount FROM payments WHERE status = 'paid'").fetchall()
        return sum((Decimal(row["amount"]) for row in amounts), Decimal("0.00"))


def _find(rows: sqlite3.Connection, order_id: str) -> sqlite3.Row | None:
    row: sqlite3.Row | None = rows.execute("SELECT * FROM payments WHERE order_id = ?", [order_id]).fetchone()
    return row


def _existing(rows: sqlite3.Connection, order_id: str) -> sqlite3.Row:
    row = _find(rows, order_id)
    if row is None:
        raise TaskFailedError(f"There is no payment for order {order_id}")
    return row


def _same(made: sqlite3.Row, user_id: str, amount: Decimal) -> dict[str, Any]:
    if made["status"] != "paid":
        raise TaskFailedError(f"Order {made['order_id']} was given up; it can't be paid any more")
    if (made["user_id"], Decimal(made["amount"])) != (user_id, amount):
        raise TaskFailedError(
            f"Order {made['order_id']} is paid already, with another amount or by another user"
        )
    return _payment(made)


def _payment(row: sqlite3.Row) -> dict[str, Any]:
    keys = ("order_id", "transaction_id", "user_id", "amount", "payment_method", "status")
    asked_by = None if row["asked_by"] is None else json.loads(row["asked_by"])
    return {**{key: row[key] for key in keys}, "asked_by": asked_by}
