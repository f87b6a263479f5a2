"""By how much the event loop is late: the gauge of what keeps everything else waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

__all__ = ["LoopLag"]

_EVERY_S: Final = 1.0


class LoopLag:
    """Measures one event loop while :meth:`run` runs there. ``monotonic`` is its clock, in seconds."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._due: float | None = None
        self._last = 0.0

    @property
    def seconds(self) -> float:
        """By how much it was late last, or is now; for other threads, too, also while it is stuck."""
        due = self._due
        return self._last if due is None else max(self._last, self._monotonic() - due)

    async def run(self) -> None:
        """Measure until cancelled."""
        try:
            while True:
                self._due = due = self._monotonic() + _EVERY_S
                await asyncio.sleep(_EVERY_S)
                self._last = max(0.0, self._monotonic() - due)
        finally:
            self._due = None
