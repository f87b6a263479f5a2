"""The bytes of an audit log: how a line is written, what files are called, where a chain ends.

Shared by the writer (:mod:`agentweave_bus.authz.audit`) and the checker
(:mod:`agentweave_bus.authz.audit_report`). ``docs/audit.md`` describes the format for other readers.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agentweave_bus.exceptions import AuditError
from agentweave_bus.strict_json import StrictEncoder

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "FIRST_PREV",
    "RESERVED_KEYS",
    "VERSION",
    "ChainTail",
    "LogName",
    "chain_tails",
    "encode_record",
    "line_hash",
]

VERSION: Final = 1
FIRST_PREV: Final = bytes(32)
"""``prev`` of a chain's first record."""
RESERVED_KEYS: Final = frozenset({"audit_id", "ts", "seq", "prev"})
"""What the log itself writes at the front of each record."""

_MAX_NAMED_CHAINS: Final = 64
_BLOCK_BYTES: Final = 65536
# The encoders have no way to write a Decimal as a number. They write a text with a mark that nobody can
# guess (new in each process, and never in a file), and the mark and the quotes are taken off again.
# Nearly always there is none, and then the mark's last byte, a rare one, is mostly nowhere in the line.
_MARK: Final = os.urandom(12).hex() + "~"
_MARK_BYTES: Final = _MARK.encode()
_MARK_END: Final = _MARK_BYTES[-1]
_MARKED_NUMBER: Final = re.compile(rb'"%b(-?[0-9.]+)"' % _MARK_BYTES)
_MAX_DIGITS: Final = 400


def _marked(value: object) -> str:
    if not isinstance(value, Decimal) or not value.is_finite():
        raise TypeError(f"it holds a {type(value).__name__}")
    if abs(value.adjusted()) > _MAX_DIGITS:
        raise ValueError("it holds a number of too many digits")
    return f"{_MARK}{value:f}"


_encode: Final = StrictEncoder(default=_marked)
_FILE: Final = re.compile(
    r"(?P<stem>.+)\.(?P<start>\d{8}T\d{6}Z)\.(?P<chain>[0-9a-f]{32})\.(?P<number>\d{4,})\.jsonl"
)


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Write a record as one line of JSON, without the newline. A ``Decimal`` stands for a number.

    Raises:
        AuditError: it holds something that JSON can't.

    """
    try:
        line = _encode(record)
    except (TypeError, ValueError, RecursionError) as problem:
        raise AuditError(f"the audit record is no JSON: {problem}") from problem
    if _MARK_END in line and _MARK_BYTES in line:
        line = _MARKED_NUMBER.sub(rb"\1", line)
    return line


def line_hash(line: bytes) -> bytes:
    """Return the hash by which the next record refers to ``line`` (without its newline)."""
    return sha256(line).digest()


@dataclass(frozen=True, slots=True)
class LogName:
    """A log's directory and the stem that its files' names begin with."""

    directory: Path
    stem: str

    @classmethod
    def of(cls, destination: str | Path) -> LogName:
        """Read a destination: ``/var/log/order.log`` (or its ``file://`` URL), or a directory."""
        path = Path(str(destination).removeprefix("file://"))
        if path.is_dir():
            return cls(path, "audit")
        return cls(path.parent, path.name.removesuffix(".jsonl").removesuffix(".log"))

    def file(self, start: str, chain: str, number: int) -> Path:
        """Return the path of a chain's file number ``number`` (from 1)."""
        return self.directory / f"{self.stem}.{start}.{chain}.{number:04d}.jsonl"

    def files(self) -> list[Path]:
        """Return the log's files in the order in which they were begun."""
        found = [(_FILE.fullmatch(path.name), path) for path in self.directory.iterdir()]
        mine = [
            (m["start"], m["chain"], int(m["number"]), p) for m, p in found if m and m["stem"] == self.stem
        ]
        return [entry[-1] for entry in sorted(mine)]


@dataclass(frozen=True, slots=True)
class ChainTail:
    """Where a file ends: its last whole record, and how many bytes of a torn one follow."""

    file: str
    chain: str
    seq: int
    hash: bytes
    torn: int

    def to_json(self) -> dict[str, Any]:
        """Return what a chain's first record says of an earlier chain."""
        known = {"file": self.file, "chain": self.chain, "seq": self.seq, "hash": self.hash.hex()}
        return {**known, "torn": self.torn} if self.torn else known


def chain_tails(name: LogName) -> list[ChainTail]:
    """Return the ends of the newest chains of a log, at most 64; unreadable ones are left out."""
    last_files: dict[str, Path] = {}
    for path in name.files():
        match = _FILE.fullmatch(path.name)
        if match:
            last_files.pop(match["chain"], None)
            last_files[match["chain"]] = path
    tails = [_tail(path, chain) for chain, path in list(last_files.items())[-_MAX_NAMED_CHAINS:]]
    return [tail for tail in tails if tail is not None]


def _tail(path: Path, chain: str) -> ChainTail | None:
    try:
        line, torn = _last_line(path)
        return ChainTail(path.name, chain, int(json.loads(line)["seq"]), line_hash(line), torn)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _last_line(path: Path) -> tuple[bytes, int]:
    """Return the last line that has its newline, and the number of bytes after it."""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        data = b""
        while position > 0 and data.count(b"\n") < 2:  # noqa: PLR2004  the line's own and the one before
            step = min(_BLOCK_BYTES, position)
            position -= step
            file.seek(position)
            data = file.read(step) + data
    whole, newline, torn = data.rpartition(b"\n")
    if not newline:
        raise ValueError("no whole line")
    return whole.rpartition(b"\n")[2], len(torn)
