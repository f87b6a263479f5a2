"""What is asked again and again, and on record once a minute: who watches asks each second, for hours.

Every time it is decided on as ever; only the audit log has fewer lines. The first is on record before
anything comes of it, and then one a minute, which says how many there were since the one before. What a
process has counted and not yet written is lost when it ends: it is less than a minute's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

__all__ = ["Repeats"]

_EVERY_MS: Final = 60_000
_MOST: Final = 1_024


class _Standing:
    __slots__ = ("recorded_ms", "since")

    def __init__(self, recorded_ms: int) -> None:
        self.recorded_ms = recorded_ms
        self.since = 0


class Repeats:
    """Says which of those that agree in ``key`` is on record; of each the newest 1,024 keys are known."""

    def __init__(self) -> None:
        self._standing: OrderedDict[Hashable, _Standing] = OrderedDict()

    def due(self, key: Hashable, now_ms: int) -> dict[str, int] | None:
        """Return what a record says of those before it, or count this one and return ``None``.

        ``now_ms`` is milliseconds since the epoch. Who gets something calls :meth:`recorded` when it is.
        """
        known = self._standing.get(key)
        if known is None:
            return {}
        if known.recorded_ms <= now_ms < known.recorded_ms + _EVERY_MS:
            known.since += 1
            return None
        return {"repeated": known.since} if known.since else {}

    def recorded(self, key: Hashable, now_ms: int) -> None:
        """Note that what was due is on record."""
        self._standing.pop(key, None)
        self._standing[key] = _Standing(now_ms)
        if len(self._standing) > _MOST:
            self._standing.popitem(last=False)
