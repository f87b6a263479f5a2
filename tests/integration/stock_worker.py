"""An agent that a worker's process can import by its name."""

from __future__ import annotations

import os
from typing import Any

from agentweave_bus import SecureAgent, capability


class StockAgent(SecureAgent):
    """Knows what is there, and who it is."""

    @capability("reserve")
    async def reserve(self, sku: str, quantity: int = 1) -> dict[str, Any]:
        return {"reserved": quantity}

    @capability("process", safe=True)
    async def process(self) -> dict[str, Any]:
        return {"pid": os.getpid()}
