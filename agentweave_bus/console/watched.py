"""Whether anybody looks at the console: its feeds ask often while somebody does, and seldom otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Watched"]


class Watched:
    """Counts who looks."""

    def __init__(self) -> None:
        self._looking = 0
        self._somebody = asyncio.Event()

    @property
    def looking(self) -> int:
        """How many look now."""
        return self._looking

    @contextmanager
    def look(self) -> Iterator[None]:
        """Look for the length of the block."""
        self._looking += 1
        self._somebody.set()
        try:
            yield
        finally:
            self._looking -= 1
            if not self._looking:
                self._somebody.clear()

    async def somebody(self) -> None:
        """Wait until somebody looks."""
        await self._somebody.wait()

    async def pause(self, seconds: float, *, unwatched_s: float) -> None:
        """Wait before asking again: ``seconds``, or while nobody looks ``unwatched_s`` at the longest."""
        if self._looking:
            await asyncio.sleep(seconds)
            return
        try:
            async with asyncio.timeout(unwatched_s):
                await self._somebody.wait()
        except TimeoutError:
            return
