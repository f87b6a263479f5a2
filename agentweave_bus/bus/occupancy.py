"""Room: how many calls an agent handles at once, and that no caller has all of it.

``places`` calls are handled at once, of one caller half of them at most. Four times as many are taken in and
wait for their turn, of one caller half of these at most; whoever asks for more is told that the agent is
busy and when to come again, before anything is claimed or asked for it. So it takes more than one caller to
keep others waiting once it is known who calls. What lies before that, the subscription's queue, is one for
all.

Bytes are counted likewise, since a call can have a megabyte of them: what is taken in has ``max_bytes`` at
most, of one caller half of these. Whoever comes on top is told the same. State: counts, and a semaphore for
each caller in flight.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["DEFAULT_MAX_BYTES", "Occupancy"]

DEFAULT_MAX_BYTES: Final = 64 * 1024 * 1024

_TAKEN_IN_PER_PLACE: Final = 4


@dataclass(slots=True)
class _Caller:
    share: asyncio.Semaphore
    taken_in: int = 0
    bytes: int = 0


class Occupancy:
    """The places of one agent.

    ``places`` is how many calls are handled at once, ``max_bytes`` how large all that are taken in may be
    together, as they came over the wire.
    """

    def __init__(self, places: int, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.taken_in = places * _TAKEN_IN_PER_PLACE
        self._taken_in_of_one = max(1, self.taken_in // 2)
        self.max_bytes = max_bytes
        self._bytes = 0
        self._places = asyncio.Semaphore(places)
        self._share = max(1, places // 2)
        self._callers: dict[SpiffeID, _Caller] = {}

    async def enter(self, caller: SpiffeID, size: int) -> bool:
        """Wait for a place for a call of ``size`` bytes; say false at once where there is no room for it."""
        known = self._callers.get(caller)
        if known is None:
            known = _Caller(asyncio.Semaphore(self._share))
        if known.taken_in >= self._taken_in_of_one or not self._has_room(known, size):
            return False
        self._callers[caller] = known
        known.taken_in += 1
        known.bytes += size
        self._bytes += size
        try:
            await known.share.acquire()
            try:
                await self._places.acquire()
            except BaseException:
                known.share.release()
                raise
        except BaseException:
            self._gone(caller, known, size)
            raise
        return True

    def leave(self, caller: SpiffeID, size: int) -> None:
        """Give back a place that :meth:`enter` gave for a call of ``size`` bytes."""
        known = self._callers[caller]
        self._places.release()
        known.share.release()
        self._gone(caller, known, size)

    def _has_room(self, known: _Caller, size: int) -> bool:
        alone = not known.bytes or known.bytes + size <= self.max_bytes // 2
        together = not self._bytes or self._bytes + size <= self.max_bytes
        return alone and together

    def _gone(self, caller: SpiffeID, known: _Caller, size: int) -> None:
        known.taken_in -= 1
        known.bytes -= size
        self._bytes -= size
        if not known.taken_in:
            del self._callers[caller]
