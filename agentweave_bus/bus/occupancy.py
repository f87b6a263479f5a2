"""Room: how many calls an agent handles at once, and that no caller has all of it.

``places`` calls are handled at once, of one caller half of them at most. Four times as many are taken in and
wait for their turn, of one caller half of these at most; whoever asks for more is told that the agent is
busy and when to come again, before anything is claimed or asked for it. So it takes more than one caller to
keep others waiting. State: a count and a semaphore for each caller in flight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import anyio

from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["Occupancy"]

_TAKEN_IN_PER_PLACE: Final = 4


@dataclass(slots=True)
class _Caller:
    share: anyio.Semaphore
    taken_in: int = 0


class Occupancy:
    """The places of one agent. ``places`` is how many calls are handled at once."""

    def __init__(self, places: int) -> None:
        self.taken_in = places * _TAKEN_IN_PER_PLACE
        self._places = anyio.Semaphore(places, fast_acquire=True)
        self._share = max(1, places // 2)
        self._callers: dict[SpiffeID, _Caller] = {}

    async def enter(self, caller: SpiffeID) -> bool:
        """Wait for a place for ``caller``; say false at once if it has its share of those who wait."""
        known = self._callers.get(caller)
        if known is None:
            known = self._callers[caller] = _Caller(anyio.Semaphore(self._share, fast_acquire=True))
        if known.taken_in >= max(1, self.taken_in // 2):
            return False
        known.taken_in += 1
        try:
            await _take(known.share)
            try:
                await _take(self._places)
            except BaseException:
                known.share.release()
                raise
        except BaseException:
            self._gone(caller, known)
            raise
        return True

    def leave(self, caller: SpiffeID) -> None:
        """Give back a place that :meth:`enter` gave."""
        known = self._callers[caller]
        self._places.release()
        known.share.release()
        self._gone(caller, known)

    def _gone(self, caller: SpiffeID, known: _Caller) -> None:
        known.taken_in -= 1
        if not known.taken_in:
            del self._callers[caller]


async def _take(semaphore: anyio.Semaphore) -> None:
    """Take a place without asking the event loop, where one is free."""
    try:
        semaphore.acquire_nowait()
    except anyio.WouldBlock:
        await semaphore.acquire()
