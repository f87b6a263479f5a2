"""Agents that hear of events and write down what they heard, for tests and for processes of their own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from agentweave_bus import RetryableError, SecureAgent, on_event
from agentweave_bus.tasks.retry import Retry

__all__ = ["HANG", "Ledger", "Listener", "Screen", "Shipping", "StuckShipping", "Warehouse"]

HANG = "hang"
"""The order with which a worker stays busy."""


class Listener(SecureAgent):
    """Keeps what it heard: (event, data, attempt)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.heard: list[tuple[str | None, dict[str, Any], int]] = []

    def note(self, **data: Any) -> None:
        self.heard.append((self.context.event, data, self.context.attempt))


class Shipping(Listener):
    @on_event("order.*")
    async def on_order(self, order_id: str) -> None:
        self.note(order_id=order_id)


class Warehouse(Listener):
    @on_event("*")
    async def on_all(self, **data: Any) -> None:
        self.note(**data)


class Screen(Listener):
    @on_event("order.*", durable=False, replicas="every")
    async def on_order(self, order_id: str) -> None:
        self.note(order_id=order_id)


class Ledger(Listener):
    """Fails at the second of its events when it first sees it."""

    @on_event("order.*", ordered=True, retry=Retry(attempts=3, first_delay=0.2, last_delay=0.2))
    async def on_order(self, number: int) -> None:
        self.note(number=number)
        if number == 1 and self.context.attempt == 1:
            raise RetryableError("later")


class StuckShipping(Listener):
    """Writes what it begins into a file, by the process that begins it, and hangs in the first one."""

    @on_event("order.*")
    async def on_order(self, order_id: str, file: str) -> None:
        first = self.context.attempt == 1
        _append(file, f"{os.getpid()} {order_id} {self.context.attempt}")
        if first and order_id == HANG:
            await asyncio.sleep(600)


def _append(file: str, line: str) -> None:
    with Path(file).open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")
