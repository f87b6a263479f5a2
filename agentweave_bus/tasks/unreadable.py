"""How long a delivery is given back that can't be read now, and may be later, before it is given up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from agentweave_bus.envelope.envelope import sha256

__all__ = ["PATIENCE_S", "Unreadable"]

PATIENCE_S: Final = 600.0
"""An authority, a chunk or a replica's own trouble may take so long to come, or to be over."""

_MOST_REMEMBERED: Final = 10_000


class Unreadable:
    """Since when each of lately 10,000 frames has been unreadable here. Forgotten ones begin anew."""

    def __init__(self, clock_ms: Callable[[], int]) -> None:
        self._clock_ms = clock_ms
        self._since: OrderedDict[bytes, int] = OrderedDict()

    def too_long(self, frame: bytes) -> bool:
        """Note that ``frame`` can't be read now; say whether that has been so for longer than is waited."""
        key, now_ms = sha256(frame), self._clock_ms()
        since_ms = self._since.setdefault(key, now_ms)
        self._since.move_to_end(key)
        if len(self._since) > _MOST_REMEMBERED:
            self._since.popitem(last=False)
        if now_ms - since_ms < PATIENCE_S * 1000:
            return False
        del self._since[key]
        return True
