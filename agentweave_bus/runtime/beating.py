"""The beats of a worker's heart, for whoever supervises it: it lives, and so it is.

How many tasks wait is asked for beside them, as often: a broker that is slow to answer must not make a worker
look as if it hung.
"""

from __future__ import annotations

import asyncio
from typing import Final

import anyio

from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.exceptions import SvidUnavailableError
from agentweave_bus.observability.heartbeat import Heartbeat, SupervisorPipe, resident_bytes
from agentweave_bus.runtime.task_service import TaskService
from agentweave_bus.runtime.wiring import Connected

__all__ = ["report"]

_ASK_EVERY_S: Final = 5.0
"""How often to ask what waits, where no supervisor says how often it wants to know."""


async def report(pipe: SupervisorPipe, parts: Connected, tasks: TaskService, *, exposed: bool) -> None:
    """Tell the supervisor how this worker is, as often as it wants to know, until cancelled.

    What waits in its queues is known for as long, if there is a supervisor or the metrics are ``exposed``.
    """
    async with owned_tasks() as group:
        if exposed or pipe.every_s is not None:
            group.start_soon(tasks.backlog.watch, pipe.every_s or _ASK_EVERY_S)
        if pipe.every_s is not None:
            group.start_soon(_beat, pipe, pipe.every_s, parts, tasks)


async def _beat(pipe: SupervisorPipe, every_s: float, parts: Connected, tasks: TaskService) -> None:
    loop = asyncio.get_running_loop()
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
                backlog=tasks.backlog.waiting,
            )
        )


def _valid_s(parts: Connected) -> float | None:
    try:
        expiry = parts.source.svid.expiry
    except SvidUnavailableError:
        return None
    return round(expiry.timestamp() - parts.surroundings.clock_ms() / 1000, 1)
