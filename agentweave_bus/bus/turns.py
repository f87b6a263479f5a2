"""How many messages are taken up in one turn of the event loop.

What is taken up together is signed together, which saves most of what a signature costs. But nothing of it
goes out before all of it is done, and whoever waits for it has nothing to do meanwhile. Sixteen save nearly
as much as all that has come, and caller and callee work at the same time.
"""

from __future__ import annotations

import asyncio
from typing import Final

__all__ = ["Turns"]

_TOGETHER: Final = 16


class Turns:
    """Ends the turn of whoever takes messages up, after every sixteen. One for each taker."""

    __slots__ = ("_taken",)

    def __init__(self) -> None:
        self._taken = 0

    async def taken(self) -> None:
        """Count a message that was taken up."""
        self._taken += 1
        if self._taken >= _TOGETHER:
            self._taken = 0
            await asyncio.sleep(0)
