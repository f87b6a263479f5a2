"""What a check of audit logs says: plain values, made by :mod:`agentweave_bus.authz.audit_report`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["AuditReport", "ChainSummary", "Finding"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong, or worth knowing.

    Attributes:
        kind: ``changed``, ``gap``, ``reordered``, ``cut``, ``missing``, ``malformed`` or ``evidence``.
        file: the file's name.
        line: from 1; 0 for the file as a whole.
        sentence: for people.

    """

    kind: str
    file: str
    line: int
    sentence: str


@dataclass(frozen=True, slots=True)
class ChainSummary:
    """One chain as it was found.

    Attributes:
        chain: its id.
        instance: who wrote it, by its own word.
        records: how many were read.
        first_seq: of the first record read.
        last_seq: of the last.
        ended: the last one is a closing record.
        named_to: up to where a later chain of the same log vouches for it; -1 for nowhere.
        witnessed_to: up to where a peer's log does; -1 for nowhere.

    """

    chain: str
    instance: str
    records: int
    first_seq: int
    last_seq: int
    ended: bool
    named_to: int
    witnessed_to: int


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What a check found. ``ok`` means no problem; read ``cannot_show`` before relying on it."""

    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    cannot_show: tuple[str, ...]
    chains: tuple[ChainSummary, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing wrong was found."""
        return not self.problems

    @property
    def records(self) -> int:
        """How many records were read."""
        return sum(chain.records for chain in self.chains)

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {"ok": self.ok, "records": self.records, **asdict(self)}
