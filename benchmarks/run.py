"""A run of the comparison: rounds, in each of which every row has its turn."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.load import Load, Sample
from benchmarks.results import IN_FLIGHT, Rounds
from benchmarks.rows import Row
from benchmarks.world import Contender, World

__all__ = ["compare", "say"]

_FIRST_WARM_S: Final = 1.0


async def compare(
    rows: Sequence[Row],
    *,
    rounds: int,
    seconds: float,
    profiles: Path | None = None,
    in_flight: Sequence[int] = IN_FLIGHT,
) -> dict[str, Rounds]:
    """Measure ``rows``; ``seconds`` is how long each is measured for each number of calls in flight.

    Every second round goes through the rows from the end, so that no row always follows the same one.
    """
    found: dict[str, list[Mapping[int, Sample]]] = {row.name: [] for row in rows}
    with tempfile.TemporaryDirectory(prefix="agentweave-bench-") as folder:
        async with World(Path(folder), rows, profiles).contenders() as contenders:
            for contender in contenders:
                await _turn(contender, max(in_flight), _FIRST_WARM_S, _FIRST_WARM_S)
                if profiles is not None:
                    for pid in (contender.processes["worker"], contender.client.pid):
                        os.kill(pid, signal.SIGUSR2)
            for number in range(rounds):
                for contender in contenders if number % 2 == 0 else contenders[::-1]:
                    say(f"round {number + 1} of {rounds}: {contender.row.name}")
                    found[contender.row.name].append(
                        {tasks: await _turn(contender, tasks, seconds / 4, seconds) for tasks in in_flight}
                    )
            say("")
    return dict(found)


async def _turn(contender: Contender, tasks: int, warm_s: float, seconds: float) -> Sample:
    return await contender.client.run(Load(tasks, warm_s, seconds), contender.processes)


def say(what: str) -> None:
    """Show how far it is, where somebody watches."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{what:<56}\r")
        sys.stderr.flush()
