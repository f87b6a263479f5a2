"""How a source of the console is: whether what it told is fresh, and if not, why."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

__all__ = ["NOT_ASKED", "SourceHealth"]


class SourceHealth(NamedTuple):
    """``at_ms`` is when it was last well (since the epoch, 0 for never); ``why`` is for people."""

    ok: bool
    why: str = ""
    at_ms: int = 0

    def failed(self, why: str) -> SourceHealth:
        """Return it with a reason for not being well; when it was last well stays."""
        return self._replace(ok=False, why=why)

    def to_json(self) -> dict[str, Any]:
        """Return it as the page reads it."""
        return {"ok": self.ok, "why": self.why, "at": self.at_ms}


NOT_ASKED: Final = SourceHealth(ok=False, why="not asked yet")
