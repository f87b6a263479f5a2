"""Room for large payloads: how many bytes of them an agent holds at once, and that no sender has all of it.

A reference has a few kilobytes, and what it refers to many megabytes. So before a blob is fetched there has
to be room for it, kept until what it was fetched for has ended. Of one sender there is half of it at most,
but always room for one blob. Who comes on top waits, and is sent away after a while.
"""

from __future__ import annotations

import asyncio
from typing import Final

from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["BlobRoom"]

_WAIT_S: Final = 20.0


class BlobRoom:
    """Counts the bytes of the blobs that are held, ``max_bytes`` at most unless a single one is larger."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._of: dict[SpiffeID, int] = {}
        self._freed = asyncio.Event()

    async def enter(self, sender: SpiffeID, size: int, *, wait_s: float = _WAIT_S) -> bool:
        """Take room for ``size`` bytes of ``sender``; false if none came free in ``wait_s`` seconds."""
        try:
            async with asyncio.timeout(wait_s):
                while not self._has_room(sender, size):
                    await self._freed.wait()
        except TimeoutError:
            return False
        self._bytes += size
        self._of[sender] = self._of.get(sender, 0) + size
        return True

    def leave(self, sender: SpiffeID, size: int) -> None:
        """Give back what :meth:`enter` gave."""
        self._bytes -= size
        self._of[sender] -= size
        if not self._of[sender]:
            del self._of[sender]
        self._freed.set()
        self._freed = asyncio.Event()

    def _has_room(self, sender: SpiffeID, size: int) -> bool:
        mine = self._of.get(sender, 0)
        alone = not mine or mine + size <= self._max_bytes // 2
        together = not self._bytes or self._bytes + size <= self._max_bytes
        return alone and together
