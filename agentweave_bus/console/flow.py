"""How many records came in each of the last seconds, by what they say: what the page draws."""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from agentweave_bus.types import TaskState

__all__ = ["SECONDS", "Flow"]

SECONDS: Final = 120

_SERIES: Final = ("begun", "completed", "failed", "other")
_SERIES_OF: Final = {
    TaskState.WORKING: "begun",
    TaskState.COMPLETED: "completed",
    TaskState.FAILED: "failed",
}


class Flow:
    """A ring of two minutes. A record of before is counted nowhere, one of the future in the last second."""

    def __init__(self) -> None:
        self._until_s = 0
        self._rings = {name: deque([0] * SECONDS, SECONDS) for name in _SERIES}

    def count(self, state: TaskState, at_ms: int, now_ms: int) -> None:
        """Count a record that was stored at ``at_ms``; both are milliseconds since the epoch."""
        self._turn(now_ms)
        back = max(0, self._until_s - at_ms // 1000)
        if back < SECONDS:
            self._rings[_SERIES_OF.get(state, "other")][SECONDS - 1 - back] += 1

    def to_json(self, now_ms: int) -> dict[str, Any]:
        """Return the series, the second of ``now_ms`` last."""
        self._turn(now_ms)
        series = {name: list(ring) for name, ring in self._rings.items()}
        return {"step_ms": 1000, "until": self._until_s * 1000, "series": series}

    def _turn(self, now_ms: int) -> None:
        steps = now_ms // 1000 - self._until_s
        if steps <= 0:  # the clock was set back: the ring stands still until it has caught up
            return
        self._until_s += steps
        for ring in self._rings.values():
            ring.extend([0] * min(steps, SECONDS))
