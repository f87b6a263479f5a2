"""Room: no caller may take all the places in which an agent handles calls.

Half of them, at most, go to one caller; whoever asks for more is told that the agent is busy and when to
come again, before anything is claimed or asked for it. State: one number for each caller in flight.
"""

from __future__ import annotations

from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["Occupancy"]


class Occupancy:
    """Counts the calls in flight of each caller. ``places`` is how many calls are handled at once."""

    def __init__(self, places: int) -> None:
        self._share = max(1, places // 2)
        self._taken: dict[SpiffeID, int] = {}

    def enter(self, caller: SpiffeID) -> bool:
        """Take a place for ``caller``; say false if it has its share already."""
        taken = self._taken.get(caller, 0)
        if taken >= self._share:
            return False
        self._taken[caller] = taken + 1
        return True

    def leave(self, caller: SpiffeID) -> None:
        """Give back a place that :meth:`enter` gave."""
        left = self._taken[caller] - 1
        if left:
            self._taken[caller] = left
        else:
            del self._taken[caller]
