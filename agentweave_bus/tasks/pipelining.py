"""Many submissions at once: so many under way that their signatures are shared, and no more than that."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from typing import Any, Final, TypeVar

__all__ = ["WINDOW", "pipelined"]

T = TypeVar("T")

WINDOW: Final = 256
"""How many are under way at once: as many as one signature covers."""


async def pipelined(
    starts: Iterable[Callable[[], Coroutine[Any, Any, T]]], window: int = WINDOW
) -> AsyncGenerator[T, None]:
    """Yield what each of ``starts`` returns, in their order, with at most ``window`` under way.

    The next ones begin as results are taken. What one raises is raised in its place; those behind it that
    are under way are cancelled then, as they are when the generator is closed.
    """
    under_way: deque[asyncio.Task[T]] = deque()
    rest = iter(starts)
    try:
        while True:
            while len(under_way) < window and (start := next(rest, None)) is not None:
                under_way.append(asyncio.create_task(start()))
            if not under_way:
                return
            yield await under_way[0]
            under_way.popleft()
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
