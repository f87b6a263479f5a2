"""How long a delivery is given back that can't be read now, and may be later, before it is given up.

Since when a frame has been unreadable here says it best: an old queue must not be given up for a short
trouble of this worker. But only so many frames are remembered, and whoever may publish can send more than
those. What finds no place goes by the broker's own word: when it was stored, how often it was given out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.tasks.queue import Delivery

__all__ = ["PATIENCE_DELIVERIES", "PATIENCE_S", "Unreadable"]

PATIENCE_S: Final = 600.0
"""An authority, a chunk or a replica's own trouble may take so long to come, or to be over."""

PATIENCE_DELIVERIES: Final = 8
"""A frame that finds no place here is given out so often at least: with the pauses, over two minutes."""

_MOST_REMEMBERED: Final = 10_000


class Unreadable:
    """Since when each of 10,000 frames has been unreadable here; it keeps its place until it is given up."""

    def __init__(self, clock_ms: Callable[[], int]) -> None:
        self._clock_ms = clock_ms
        self._since: OrderedDict[bytes, tuple[int, int]] = OrderedDict()  # first and last; the last in order

    def too_long(self, delivery: Delivery) -> bool:
        """Note that a delivery can't be read now; say whether that has been so for longer than is waited."""
        key, now_ms = sha256(delivery.data), self._clock_ms()
        if key not in self._since and not self._has_room(now_ms):
            lain_ms = now_ms - delivery.stored_at_ms
            return lain_ms >= PATIENCE_S * 1000 and delivery.delivered >= PATIENCE_DELIVERIES
        since_ms, _ = self._since.get(key, (now_ms, now_ms))
        if now_ms - since_ms < PATIENCE_S * 1000:
            self._since[key] = (since_ms, now_ms)
            self._since.move_to_end(key)
            return False
        del self._since[key]
        return True

    def _has_room(self, now_ms: int) -> bool:
        """Say whether there is a place. What has not come for twice the time is another worker's by now."""
        if len(self._since) >= _MOST_REMEMBERED:
            key, (_, last_ms) = next(iter(self._since.items()))
            if now_ms - last_ms >= 2 * PATIENCE_S * 1000:
                del self._since[key]
        return len(self._since) < _MOST_REMEMBERED
