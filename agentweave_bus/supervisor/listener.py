"""The supervisor's own listener: the metrics of all workers, and whether they work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import anyio
import anyio.to_thread

from agentweave_bus.config import MetricsConfig
from agentweave_bus.observability.exposition import Exposition
from agentweave_bus.supervisor.collected_metrics import CollectedMetrics
from agentweave_bus.supervisor.place import PlaceState
from agentweave_bus.supervisor.supervisor import Supervisor

__all__ = ["supervisor_listener"]

_STATUS_S: Final = 2.0


@asynccontextmanager
async def supervisor_listener(settings: MetricsConfig, supervisor: Supervisor) -> AsyncIterator[str | None]:
    """Serve ``/metrics``, ``/healthz`` and ``/readyz`` for the length of the block; yield the metrics' URL.

    It is ready when every worker is. Where ``settings`` name no port a free one is taken, since workers may
    want the usual one; where they want no listener there is none.
    """
    if not settings.enabled:
        yield None
        return
    loop = asyncio.get_running_loop()

    def status() -> list[dict[str, Any]]:
        return asyncio.run_coroutine_threadsafe(_status(supervisor), loop).result(_STATUS_S)

    def health() -> tuple[bool, Mapping[str, Any]]:
        return True, {}

    def ready() -> tuple[bool, Mapping[str, Any]]:
        states = {one["name"]: one["state"] for one in status()}
        return all(state == PlaceState.READY for state in states.values()), {"workers": states}

    if "port" not in settings.model_fields_set:
        settings = settings.model_copy(update={"port": 0})
    listener = Exposition(settings, CollectedMetrics(status), health=health, ready=ready)
    listener.start()
    try:
        yield f"http://{settings.host}:{listener.port}{settings.path}"
    finally:
        with anyio.CancelScope(shield=True):  # bounded by how long one scrape may take
            await anyio.to_thread.run_sync(listener.close)


async def _status(supervisor: Supervisor) -> list[dict[str, Any]]:
    return supervisor.status()
