"""How many refusals of unknown senders are written down: they cost their sender one byte each.

Whoever may publish to an agent can send it what is refused before anybody is known (steps 1 to 5), as fast
as the broker carries it. Each of these is counted by the metrics; written to the log and the audit log is a
burst of them and then a few a second, each with the number of those that were not written before it.
"""

from __future__ import annotations

from typing import Final

from agentweave_bus.bus.token_bucket import TokenBucket

__all__ = ["RefusalRate"]

_BURST: Final = 2_000
_PER_SECOND: Final = 20.0


class RefusalRate:
    """Counts what is turned away. Times are milliseconds."""

    def __init__(self) -> None:
        self._bucket = TokenBucket(_BURST)
        self._turned_away = 0

    def take(self, now_ms: int) -> int | None:
        """Say whether one may be written now: how many were not since the last, or ``None`` for no."""
        if not self._bucket.take(now_ms, size=_BURST, per_second=_PER_SECOND):
            self._turned_away += 1
            return None
        unwritten, self._turned_away = self._turned_away, 0
        return unwritten
