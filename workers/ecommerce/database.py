"""State that every replica of an agent sees: a SQLite file, changed in one transaction per act.

An act is what a capability does: all of it is stored, or nothing. Replicas on one host share the file;
write-ahead logging lets them read while one writes. Connections are opened for an act and closed after
it, so any thread may act.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

__all__ = ["DATA_VARIABLE", "Database", "data_directory", "utc_now"]

DATA_VARIABLE: Final = "ECOMMERCE_DATA"
"""The environment variable that names the directory of the databases."""

_DEFAULT_DIRECTORY: Final = ".agentweave/ecommerce"
_BUSY_SECONDS: Final = 5.0


def data_directory() -> Path:
    """Return the directory of the databases: ``ECOMMERCE_DATA``, else one below the working directory."""
    return Path(os.environ.get(DATA_VARIABLE, _DEFAULT_DIRECTORY))


def utc_now() -> str:
    """Return the time as ISO 8601, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Database:
    """One agent's file. ``schema`` is run when it is opened, and must be harmless when run again."""

    def __init__(self, path: Path, schema: str) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        self.path = path
        with closing(self._connect()) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(f"BEGIN IMMEDIATE; {schema}; COMMIT;")

    @contextmanager
    def act(self) -> Iterator[sqlite3.Connection]:
        """Do everything in the block, or nothing of it. Others who write wait until it is over."""
        yield from self._transaction("BEGIN IMMEDIATE")

    @contextmanager
    def look(self) -> Iterator[sqlite3.Connection]:
        """Read one consistent state."""
        yield from self._transaction("BEGIN")

    def _transaction(self, begin: str) -> Iterator[sqlite3.Connection]:
        with closing(self._connect()) as connection:
            connection.execute(begin)
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        return connection
