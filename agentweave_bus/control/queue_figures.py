"""How many tasks wait where, by the broker's word: in queues, parked until they are due, given up.

It is asked for each second by whoever watches, so one look stands for a moment, for all who ask.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from agentweave_bus.bus.streams import dead_stream_name, parked_stream_name, tasks_stream_name
from agentweave_bus.bus.subjects import Family, agent_prefix, parse_subject
from agentweave_bus.control.stream_reader import StreamFigures, StreamReader
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["QueueFigures"]

_FRESH_S: Final = 0.9

Row = dict[str, Any]


class _Letters(NamedTuple):
    """How many dead letters there were when the stream stood so."""

    figures: StreamFigures
    waiting: int


class QueueFigures:
    """Counts what waits for ``everyone`` at a broker. ``monotonic`` is in seconds."""

    def __init__(
        self,
        reader: StreamReader,
        everyone: Callable[[], Iterable[SpiffeID]],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reader = reader
        self._everyone = everyone
        self._monotonic = monotonic
        self._counted: dict[SpiffeID, _Letters] = {}
        self._told: tuple[float, dict[str, Any]] | None = None
        self._looking = asyncio.Lock()

    async def told(self) -> dict[str, Any]:
        """Return how many tasks wait where, of each agent and capability, by the broker's word.

        ``letters`` are the dead letters that nobody has dropped. Raises BusError.
        """
        async with self._looking:
            if self._told is None or self._monotonic() >= self._told[0] + _FRESH_S:
                told = {
                    "queues": await self._waiting(),
                    "parked": await self._parked(),
                    "letters": await self._dead(),
                }
                self._told = self._monotonic(), told
            return self._told[1]

    async def _waiting(self) -> list[Row]:
        rows: list[Row] = []
        for agent, stream in (
            await self._reader.streams_of(self._everyone(), Family.TASK, tasks_stream_name)
        ).items():
            sums: dict[str, Row] = {}
            for one in await self._reader.consumers(stream.name):
                capability = parse_subject(one.subject).rest[-1].partition("=")[0]  # of whatever priority
                row = sums.setdefault(
                    capability,
                    {
                        "agent": str(agent),
                        "capability": capability,
                        "pending": 0,
                        "in_flight": 0,
                        "redelivered": 0,
                        "workers_waiting": 0,
                    },
                )
                row["pending"] += one.pending
                row["in_flight"] += one.in_flight
                row["redelivered"] += one.redelivered
                # A worker asks for tasks of each priority.
                row["workers_waiting"] = max(row["workers_waiting"], one.waiting)
            rows += [sums[name] for name in sorted(sums)]
        return rows

    async def _parked(self) -> list[Row]:
        streams = await self._reader.streams_of(self._everyone(), Family.PARK, parked_stream_name)
        return [{"agent": str(agent), "waiting": one.messages} for agent, one in streams.items()]

    async def _dead(self) -> list[Row]:
        streams = await self._reader.streams_of(self._everyone(), Family.DEAD, dead_stream_name)
        self._counted = {agent: one for agent, one in self._counted.items() if agent in streams}
        for agent, figures in streams.items():
            known = self._counted.get(agent)
            if known is None or known.figures != figures:
                self._counted[agent] = _Letters(figures, await self._letters_of(agent, figures))
        return [{"agent": str(agent), "count": self._counted[agent].waiting} for agent in streams]

    async def _letters_of(self, agent: SpiffeID, figures: StreamFigures) -> int:
        if figures.messages == 0:
            return 0
        prefix = f"{agent_prefix(Family.DEAD, agent)}.*.*.*"
        letters = await self._reader.count(figures.name, f"{prefix}.record")
        return max(0, letters - await self._reader.count(figures.name, f"{prefix}.dropped"))
