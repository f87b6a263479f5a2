"""The supervisor's own listener: the metrics of all workers, and whether they work."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import anyio
import anyio.to_thread

from agentweave_bus.config import MetricsConfig
from agentweave_bus.observability.exposition import Exposition
from agentweave_bus.observability.metrics import ReadyPart
from agentweave_bus.supervisor.collected_metrics import CollectedMetrics
from agentweave_bus.supervisor.fetching import fetch_all
from agentweave_bus.supervisor.place import PlaceState
from agentweave_bus.supervisor.supervisor import Supervisor

__all__ = ["supervisor_listener"]

_STATUS_S: Final = 2.0


@asynccontextmanager
async def supervisor_listener(settings: MetricsConfig, supervisor: Supervisor) -> AsyncIterator[str | None]:
    """Serve ``/metrics``, ``/healthz`` and ``/readyz`` for the length of the block; yield the metrics' URL.

    It is ready when every worker is, by its own word: one with a listener is asked. Where ``settings`` name
    no port a free one is taken, since workers may want the usual one; where they want no listener there is
    none.
    """
    if not settings.enabled:
        yield None
        return
    loop = asyncio.get_running_loop()

    def status() -> list[dict[str, Any]]:
        return asyncio.run_coroutine_threadsafe(_status(supervisor), loop).result(_STATUS_S)

    def leaving() -> frozenset[tuple[str, int]]:
        return asyncio.run_coroutine_threadsafe(_leaving(supervisor), loop).result(_STATUS_S)

    def health() -> tuple[bool, Mapping[str, Any]]:
        return True, {}

    def ready() -> tuple[bool, Mapping[str, Any]]:
        states = _states(status())
        return all(state == PlaceState.READY for state in states.values()), {"workers": states}

    if "port" not in settings.model_fields_set:
        settings = settings.model_copy(update={"port": 0})
    collected = CollectedMetrics(status, leaving, supervisor.counted)
    listener = Exposition(settings, collected, health=health, ready=ready)
    listener.start()
    try:
        yield listener.url
    finally:
        with anyio.CancelScope(shield=True):  # bounded by how long one scrape may take
            await anyio.to_thread.run_sync(listener.close)


def _states(workers: list[dict[str, Any]]) -> dict[str, str]:
    """Return what goes on at each place; of workers that run but are of no use now, what is not well."""
    states: dict[str, str] = {one["name"]: one["state"] for one in workers}
    asked = {
        one["name"]: urlunsplit(("http", urlsplit(one["metrics"]).netloc, "/readyz", "", ""))
        for one in workers
        if one["state"] == PlaceState.READY and one["metrics"] is not None
    }
    for name, page in zip(asked, fetch_all(asked.values()), strict=True):
        if page is None:
            states[name] = "it does not answer"
        elif page.status != HTTPStatus.OK:
            states[name] = f"not well: {', '.join(_unwell(page.text)) or 'unknown'}"
    return states


def _unwell(text: str) -> Iterator[str]:
    """Return the parts of a worker's readiness that are not as they must be."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(told, dict):
        yield from (part for part in ReadyPart if told.get(part) is False)


async def _status(supervisor: Supervisor) -> list[dict[str, Any]]:
    return supervisor.status()


async def _leaving(supervisor: Supervisor) -> frozenset[tuple[str, int]]:
    return supervisor.leaving()
