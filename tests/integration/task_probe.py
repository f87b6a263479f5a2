"""An agent with durable tasks whose tests decide when a step of a handler is taken."""

from __future__ import annotations

import asyncio
from typing import Any

from agentweave_bus import capability
from tests.integration.probes import Probe


class TaskProbe(Probe):
    """Tells of its progress, as its tests allow."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.turns: asyncio.Queue[None] = asyncio.Queue()
        self.cleaned_up = asyncio.Event()

    def take_turns(self, count: int) -> None:
        """Let so many pieces be made."""
        for _ in range(count):
            self.turns.put_nowait(None)

    @capability("pieces", concurrency=1)
    async def pieces(self, count: int) -> dict[str, Any]:
        """Make pieces, one at a turn."""
        self.ran.append("pieces")
        self.entered.set()
        try:
            for number in range(count):
                await self.turns.get()
                await self.context.artifact("piece", number)
                await self.context.progress((number + 1) / count, f"{number + 1} of {count}")
        except asyncio.CancelledError:
            self.cleaned_up.set()
            raise
        return {"count": count}
