"""How many tasks wait in an agent's queues.

What a pull brings along says it only to whoever has room to pull. So the consumers are asked themselves,
every so often, also while all workers are busy.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Final

import anyio

from agentweave_bus.bus.connection import Keeper, NotPermittedError
from agentweave_bus.bus.streams import task_consumer
from agentweave_bus.bus.subjects import Priority
from agentweave_bus.exceptions import BusError
from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["Backlog"]

_log = logging.getLogger(__name__)

_ASK_S: Final = 2.0
"""For the answers of all consumers together."""
_REFUSED_S: Final = 60.0
"""A broker that does not let this agent ask notes each attempt."""


class Backlog:
    """What waits for ``agent``: tasks that no worker has been given yet.

    The broker counts what a worker gave back, and what waits for a retry, with that which is worked on.
    """

    def __init__(
        self, agent: SpiffeID, capabilities: Iterable[str], *, keeper: Keeper, metrics: Metrics
    ) -> None:
        self.waiting: int | None = None
        """How many tasks waited lately, of all capabilities; ``None`` where that is not known."""
        self._keeper = keeper
        self._depth = metrics.queue_depth
        self._consumers = {
            capability: [task_consumer(agent, capability, priority) for priority in Priority]
            for capability in capabilities
        }
        self._refused = False

    async def watch(self, every_s: float) -> None:
        """Ask every ``every_s`` seconds, until cancelled."""
        while self._consumers:
            await self._look()
            await anyio.sleep(_REFUSED_S if self._refused else every_s)

    async def _look(self) -> None:
        depths = await self._depths() if self._keeper.connected else None
        if depths is None:
            self.waiting = None
            self._depth.clear()  # a number that is not known any more is none
            return
        self.waiting = sum(depths.values())
        for capability, depth in depths.items():
            self._depth.labels(capability).set(depth)

    async def _depths(self) -> dict[str, int] | None:
        """Ask every consumer; ``None`` when not all have answered."""
        depths = dict.fromkeys(self._consumers, 0)
        try:
            async with asyncio.timeout(_ASK_S):
                for capability, consumers in self._consumers.items():
                    for one in consumers:
                        depths[capability] += await self._pending(f"{one.stream}.{one.name}")
        except NotPermittedError as error:
            if not self._refused:
                _log.warning("how many tasks wait is not known: %s", error)
            self._refused = True
            return None
        except (BusError, TimeoutError) as error:
            _log.info("how many tasks wait is not known: %s", str(error) or "no answer in time")
            return None
        self._refused = False
        return depths

    async def _pending(self, consumer: str) -> int:
        subject = f"$JS.API.CONSUMER.INFO.{consumer}"
        try:
            answer: Any = json.loads((await self._keeper.ask(subject, b"", timeout_s=_ASK_S)).data)
            error = answer.get("error")
            if error is not None and error["code"] == HTTPStatus.NOT_FOUND:
                return 0  # there is no such queue yet
            return int(answer["num_pending"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BusError(f"the broker's answer on {subject} is not understood") from error
