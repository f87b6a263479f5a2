"""A token bucket: so many at once, and so many a second from then on."""

from __future__ import annotations

__all__ = ["TokenBucket"]


class TokenBucket:
    """One allowance, full at first. Times are milliseconds; a clock that goes back adds nothing."""

    __slots__ = ("_since_ms", "_tokens")

    def __init__(self, size: float) -> None:
        self._tokens = size
        self._since_ms = 0

    def take(self, now_ms: int, *, size: float, per_second: float) -> bool:
        """Use one, if there is one left of at most ``size``, which come back at ``per_second``."""
        refill = max(0, now_ms - self._since_ms) * per_second / 1000
        self._tokens = min(size, self._tokens + refill)
        self._since_ms = max(now_ms, self._since_ms)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
