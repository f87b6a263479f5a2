"""The beats of a worker's heart, for whoever supervises it: it lives, and so it is."""

from __future__ import annotations

import asyncio

import anyio

from agentweave_bus.exceptions import SvidUnavailableError
from agentweave_bus.observability.heartbeat import Heartbeat, SupervisorPipe, resident_bytes
from agentweave_bus.runtime.task_service import TaskService
from agentweave_bus.runtime.wiring import Connected

__all__ = ["beat"]


async def beat(pipe: SupervisorPipe, parts: Connected, tasks: TaskService) -> None:
    """Tell the supervisor how this worker is, as often as it wants to know, until cancelled."""
    every_s, loop = pipe.every_s, asyncio.get_running_loop()
    if every_s is None:
        return
    while True:
        due = loop.time() + every_s
        await anyio.sleep(every_s)
        pipe.beat(
            Heartbeat(
                lag_s=round(loop.time() - due, 4),
                in_flight=parts.metrics.now_serving(),
                handled=parts.metrics.handled(),
                resident=resident_bytes(),
                connected=parts.keeper.connected,
                idle_s=tasks.idle_s,
                svid_s=_valid_s(parts),
            )
        )


def _valid_s(parts: Connected) -> float | None:
    try:
        expiry = parts.source.svid.expiry
    except SvidUnavailableError:
        return None
    return round(expiry.timestamp() - parts.surroundings.clock_ms() / 1000, 1)
