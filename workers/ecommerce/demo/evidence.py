"""What really happened: the agents' databases, their metrics, and their audit logs."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from workers.ecommerce.demo.screen import DidNotHappenError
from workers.ecommerce.orders import Orders
from workers.ecommerce.payments import Payments
from workers.ecommerce.stock import Stock

__all__ = ["SKU", "AuditTrail", "Refusal", "available", "charged", "handler_runs", "orders_of"]

SKU: Final = "WIDGET-001"

_DEADLINE_S: Final = 5.0
_LOOK_AGAIN_S: Final = 0.01
_RUNS: Final = re.compile(
    r"^agentweave_task_duration_seconds_count\{capability=\"(\w+)\"\} ([0-9.]+)$", re.MULTILINE
)


async def handler_runs(metrics_url: str | None, capability: str) -> int:
    """Return how often the handler of ``capability`` has run in the process behind ``metrics_url``."""
    text = await asyncio.to_thread(_fetch, metrics_url)
    return int(sum(float(count) for name, count in _RUNS.findall(text) if name == capability))


def _fetch(url: str | None) -> str:
    if url is None or not url.startswith("http://127.0.0.1:"):
        raise DidNotHappenError(f"a worker has no metrics: {url}")
    with urllib.request.urlopen(url, timeout=_DEADLINE_S) as answer:  # noqa: S310 - checked above
        text: str = answer.read().decode()
        return text


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refusal as the agent that refused has recorded it."""

    step: int
    step_name: str
    reason: str
    audit_id: str

    def __str__(self) -> str:
        return f"step {self.step} ({self.step_name})"


class AuditTrail:
    """The audit log of one agent, followed from where it was when this was made."""

    def __init__(self, directory: Path, agent: str) -> None:
        self._directory = directory
        self._agent = agent
        self._seen = {record["audit_id"] for record in self._records()}

    async def refusal(self) -> Refusal:
        """Return the next refusal that is recorded.

        Raises:
            DidNotHappenError: none is within five seconds.

        """
        give_up = time.monotonic() + _DEADLINE_S
        while time.monotonic() < give_up:
            for record in self._records():
                if record["audit_id"] not in self._seen:
                    self._seen.add(record["audit_id"])
                    if record["event"] == "refusal":
                        return _refusal(record)
            await asyncio.sleep(_LOOK_AGAIN_S)  # another process's file: there is no event to wait for
        raise DidNotHappenError(f"{self._agent} has recorded no refusal")

    def _records(self) -> Iterator[dict[str, Any]]:
        for file in sorted(self._directory.glob(f"{self._agent}.*.jsonl")):
            for line in file.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # the last one may be half written
                    yield json.loads(line)


def _refusal(record: Mapping[str, Any]) -> Refusal:
    return Refusal(record["step"], record["step_name"], record["reason"], record["audit_id"])


def charged() -> Decimal:
    """Return what is paid and not refunded, of all orders together."""
    return Payments().charged()


def available() -> int:
    """Return how many widgets are in stock."""
    return next(int(article["available"]) for article in Stock().articles() if article["sku"] == SKU)


def orders_of(user_id: str) -> list[str]:
    """Return how each of a user's orders stands, the newest first."""
    return [str(order["status"]) for order in Orders().of_user(user_id, 100)]
