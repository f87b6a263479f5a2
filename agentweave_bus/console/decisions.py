"""What the page shows of audit records: decisions about requests, as rows. Payloads are not among it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from agentweave_bus.authz.audit_reading import context_of
from agentweave_bus.tasks.operator_acts import OBSERVE_ACT

__all__ = ["MOST_DECISIONS", "Decisions", "decision_row", "principal_of", "refusal_verdict"]

MOST_DECISIONS: Final = 200

_DECISIONS: Final = frozenset({"admission", "refusal", "call", "submit", "publish", "control"})
_TEXTS: Final = ("action", "direction", "reason", "revision", "audit_id", "id", "digest", "trace_id")
_LONGEST: Final = 1_000
_MOST_OF_PRINCIPAL: Final = 8


def decision_row(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a record as the page shows it, ``None`` of one that is no decision.

    Its ``verdict`` is *allowed*, or what :func:`refusal_verdict` says.
    """
    if record.get("event") not in _DECISIONS:
        return None
    allowed = record.get("allowed") is True and record["event"] != "refusal"
    row: dict[str, Any] = {
        "at": int(record.get("ts", 0)),
        "log": str(record.get("log", "")),
        "event": record["event"],
        "allowed": allowed,
        "verdict": "allowed" if allowed else refusal_verdict(record),
        "caller": _text(record.get("caller") or record.get("iss")),
        "callee": _text(record.get("callee") or record.get("aud")),
        "step": _text(record.get("step_name") or record.get("step")),
        **{name: _text(record.get(name)) for name in _TEXTS},
    }
    row["action"] = row["action"] or _text(record.get("cap"))
    if (principal := principal_of(record)) is not None:
        row["principal"] = principal
    return row


def refusal_verdict(record: Mapping[str, Any]) -> str:
    """Return *denied* of a refusal for which a policy said no, *refused* where none was asked."""
    return "denied" if "allowed" in record else "refused"


def principal_of(record: Mapping[str, Any]) -> dict[str, str] | None:
    """Return on whose behalf a decision was asked for: who that is, and who vouches for it."""
    principal = context_of(record).get("principal")
    members = list(principal.items())[:_MOST_OF_PRINCIPAL] if isinstance(principal, dict) else []
    return {_text(name): _text(value) for name, value in members} or None


class Decisions:
    """The newest decisions, and how many there were of each kind since the console began to look."""

    def __init__(self, most: int = MOST_DECISIONS) -> None:
        self._newest: deque[dict[str, Any]] = deque(maxlen=most)
        self.counts = {"allowed": 0, "denied": 0, "refused": 0}

    def add(self, record: Mapping[str, Any]) -> bool:
        """Take in an audit record; False for one that is no decision.

        That consoles were let look is left out: nothing else would be seen.
        """
        row = decision_row(record)
        if row is None or (row["allowed"] and row["action"] == OBSERVE_ACT):
            return False
        self.counts[row["verdict"]] += 1
        self._newest.append(row)
        return True

    def newest(self) -> list[dict[str, Any]]:
        """Return them, the newest first."""
        return sorted(self._newest, key=lambda row: row["at"], reverse=True)


def _text(value: object) -> str:
    return "" if value is None else str(value)[:_LONGEST]
