"""Whether all workers are ready, by their own word; each worker here is a real listener."""

from __future__ import annotations

import json
from collections import deque
from contextlib import ExitStack
from typing import Any

import anyio.to_thread
import pytest

from agentweave_bus.config import MetricsConfig
from agentweave_bus.observability.exposition import Exposition
from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.supervisor.listener import supervisor_listener
from tests.integration.scraping import fetched

pytestmark = pytest.mark.anyio


class Workers:
    """What a supervisor knows, and what its workers say of themselves."""

    def __init__(self, stack: ExitStack) -> None:
        self.known: list[dict[str, Any]] = []
        self.counted: deque[tuple[str, int, str]] = deque()
        self.say: dict[str, dict[str, Any]] = {}
        self._stack = stack

    def start(self, name: str, state: str = "ready", *, listens: bool = True) -> Exposition:
        def ready() -> tuple[bool, dict[str, Any]]:
            told = self.say.get(name, {})
            return not told, told

        listener = Exposition(
            MetricsConfig(port=0, path="/own"), Metrics.create(), health=lambda: (True, {}), ready=ready
        )
        self._stack.enter_context(listener)
        url = f"http://127.0.0.1:{listener.port}/own" if listens else None
        self.known.append({"name": name, "state": state, "metrics": url})
        return listener

    def status(self) -> list[dict[str, Any]]:
        return self.known

    def leaving(self) -> frozenset[tuple[str, int]]:
        return frozenset()


async def told(workers: Workers) -> tuple[int, dict[str, str]]:
    async with supervisor_listener(MetricsConfig(path="/all"), workers) as url:  # type: ignore[arg-type]
        assert url is not None
        status, text = await anyio.to_thread.run_sync(fetched, url.replace("/all", "/readyz"))
    return status, json.loads(text)["workers"]


async def test_each_worker_is_asked_and_what_is_not_well_is_named() -> None:
    with ExitStack() as stack:
        workers = Workers(stack)
        workers.start("a/1")
        gone = workers.start("a/2")
        workers.start("quiet", listens=False)
        assert await told(workers) == (200, {"a/1": "ready", "a/2": "ready", "quiet": "ready"})
        workers.say["a/1"] = {"connected": True, "policy": False, "identity": False, "<script>": False}
        assert await told(workers) == (
            503,
            {"a/1": "not well: identity, policy", "a/2": "ready", "quiet": "ready"},
        )
        workers.say["a/1"] = {}
        gone.close()
        assert await told(workers) == (503, {"a/1": "ready", "a/2": "it does not answer", "quiet": "ready"})
        workers.known[1]["state"] = "starting"
        assert await told(workers) == (503, {"a/1": "ready", "a/2": "starting", "quiet": "ready"})
