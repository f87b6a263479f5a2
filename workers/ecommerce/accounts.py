"""Customers' accounts: who they are, their profile, their tier."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias

from agentweave_bus.exceptions import TaskFailedError
from workers.ecommerce.database import Database, data_directory, utc_now
from workers.ecommerce.passwords import hash_password, password_matches

__all__ = ["Accounts", "Tier"]

Tier: TypeAlias = Literal["free", "premium", "enterprise"]

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS accounts (
    user_id TEXT PRIMARY KEY,
    request TEXT NOT NULL UNIQUE,
    email TEXT NOT NULL UNIQUE COLLATE NOCASE,
    name TEXT NOT NULL,
    tier TEXT NOT NULL,
    tier_requested TEXT NOT NULL,
    password TEXT,
    owner TEXT,
    profile TEXT NOT NULL DEFAULT '{}',
    created_at TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS orders_heard_of (
    order_id TEXT PRIMARY KEY,
    user_id TEXT NOT NULL
)"""


class Accounts:
    """The accounts in ``users.db``.

    An account that was made for a principal belongs to it: ``owner`` is that principal, and only for
    it is the profile shown or changed.
    """

    def __init__(self) -> None:
        self._database = Database(data_directory() / "users.db", _SCHEMA)

    def create(
        self, request: str, email: str, name: str, *, tier: Tier, password: str | None, owner: str | None
    ) -> dict[str, Any]:
        """Store a new account; the same ``request`` again returns the account that it made."""
        hashed = None if password is None else hash_password(password)
        with self._database.act() as rows:
            made = rows.execute("SELECT * FROM accounts WHERE request = ?", [request]).fetchone()
            if made is not None:
                return _account(made)
            if rows.execute("SELECT 1 FROM accounts WHERE email = ?", [email]).fetchone():
                raise TaskFailedError(f"There is an account for {email} already")
            user_id = str(uuid.uuid4())
            rows.execute(
                "INSERT INTO accounts (user_id, request, email, name, tier, tier_requested, password, owner,"
                " created_at) VALUES (?, ?, ?, ?, 'free', ?, ?, ?, ?)",
                [user_id, request, email, name, tier, hashed, owner, utc_now()],
            )
            return _account(_row(rows, user_id))

    def find(self, user_id: str) -> dict[str, Any]:
        """Return what other agents may know of an account."""
        with self._database.look() as rows:
            return _account(_row(rows, user_id))

    def authenticate(self, email: str, password: str) -> dict[str, Any]:
        """Return the account whose password this is."""
        with self._database.look() as rows:
            row = rows.execute("SELECT * FROM accounts WHERE email = ?", [email]).fetchone()
        if not password_matches(password, row["password"] if row else None):
            raise TaskFailedError("Wrong email or password")
        return _account(row)

    def set_tier(self, user_id: str, tier: Tier) -> dict[str, Any]:
        """Change the tier."""
        with self._database.act() as rows:
            _row(rows, user_id)
            rows.execute(
                "UPDATE accounts SET tier = ?, tier_requested = ? WHERE user_id = ?", [tier, tier, user_id]
            )
            return _account(_row(rows, user_id))

    def profile(self, user_id: str, asker: str | None) -> dict[str, Any]:
        """Return the account with its profile, for its owner."""
        with self._database.look() as rows:
            return _profile(rows, _owned(rows, user_id, asker))

    def update_profile(self, user_id: str, asker: str | None, changes: Mapping[str, str]) -> dict[str, Any]:
        """Change the named fields of the profile, for its owner; an empty text removes one."""
        with self._database.act() as rows:
            profile = json.loads(_owned(rows, user_id, asker)["profile"]) | dict(changes)
            kept = {field: text for field, text in profile.items() if text}
            rows.execute("UPDATE accounts SET profile = ? WHERE user_id = ?", [json.dumps(kept), user_id])
            return _profile(rows, _row(rows, user_id))

    def note_order(self, order_id: str, user_id: str) -> None:
        """Count a confirmed order of a user, once, however often it is heard of."""
        with self._database.act() as rows:
            rows.execute("INSERT OR IGNORE INTO orders_heard_of VALUES (?, ?)", [order_id, user_id])


def _row(rows: sqlite3.Connection, user_id: str) -> sqlite3.Row:
    row: sqlite3.Row | None = rows.execute("SELECT * FROM accounts WHERE user_id = ?", [user_id]).fetchone()
    if row is None:
        raise TaskFailedError(f"User {user_id} not found")
    return row


def _owned(rows: sqlite3.Connection, user_id: str, asker: str | None) -> sqlite3.Row:
    row = _row(rows, user_id)
    if row["owner"] is not None and row["owner"] != asker:
        raise TaskFailedError(f"User {user_id} not found")  # to others it doesn't exist
    return row


def _account(row: sqlite3.Row) -> dict[str, Any]:
    account = {key: row[key] for key in ("user_id", "email", "name", "tier")}
    return (
        account
        if row["tier_requested"] == row["tier"]
        else {**account, "tier_requested": row["tier_requested"]}
    )


def _profile(rows: sqlite3.Connection, row: sqlite3.Row) -> dict[str, Any]:
    heard_of = rows.execute("SELECT count(*) FROM orders_heard_of WHERE user_id = ?", [row["user_id"]])
    return {
        **_account(row),
        "profile": json.loads(row["profile"]),
        "orders": heard_of.fetchone()[0],
        "created_at": row["created_at"],
    }
