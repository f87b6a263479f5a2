"""Many submissions at once: so many under way that their signatures are shared, and no more than that."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from itertools import islice
from typing import Any, Final, TypeVar

__all__ = ["AT_ONCE", "BATCH", "pipelined"]

T = TypeVar("T")
R = TypeVar("R")

BATCH: Final = 64
"""How many are submitted in one go."""

AT_ONCE: Final = 4
"""How many batches are under way: while some wait for the broker, another one is prepared."""


async def pipelined(
    submit: Callable[[Sequence[T]], Coroutine[Any, Any, Sequence[R | Exception]]], items: Iterable[T]
) -> AsyncGenerator[R, None]:
    """Yield what ``submit`` returns for each of ``items``, which it is given in batches, in their order.

    The next ones begin as results are taken. An exception that it returns is raised in its item's place, and
    one that it raises in the batch's; what is under way behind it is cancelled then, as it is when the
    generator is closed.
    """
    under_way: deque[asyncio.Task[Sequence[R | Exception]]] = deque()
    rest = iter(items)
    try:
        while True:
            while len(under_way) < AT_ONCE and (batch := list(islice(rest, BATCH))):
                under_way.append(asyncio.create_task(submit(batch)))
            if not under_way:
                return
            for outcome in await under_way[0]:
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
            under_way.popleft()
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
