"""What runs found: medians over rounds with their spread, and ratios to other rows within one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

from benchmarks.load import Sample

__all__ = ["IN_FLIGHT", "Figure", "Rounds", "RowFigures", "StageFigure", "figures_of", "ratio", "rounds_of"]

T = TypeVar("T")

IN_FLIGHT: Final = (1, 64, 256)

Rounds: TypeAlias = Sequence[Mapping[int, Sample]]
"""The samples of one row: for each round, by how many calls were in flight."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A median of several rounds, and the least and the greatest that was seen."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Figure:
        """Return the figure for ``values``, one a round."""
        return Figure(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFigures:
    """One row. Times in microseconds, throughput in calls a second, memory in MB (of 10^6 bytes).

    Processor time is of a call with 64 in flight. Memory is the worker's at its most.
    """

    p50: Figure
    p99: Figure
    at_64: Figure
    at_256: Figure
    worker_cpu: Figure
    client_cpu: Figure
    broker_cpu: Figure | None
    memory: Figure


@dataclass(frozen=True, slots=True)
class StageFigure:
    """What one stage costs, in microseconds a call: by itself, and as one of 16 in one turn of the loop."""

    name: str
    alone: Figure
    of_16: Figure | None = None

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> StageFigure:
        """Read what ``dataclasses.asdict`` made."""
        together = value["of_16"]
        return StageFigure(
            value["name"], Figure(**value["alone"]), None if together is None else Figure(**together)
        )


def figures_of(rounds: Rounds) -> RowFigures:
    """Work out a row's figures."""

    def over(value: Callable[[Mapping[int, Sample]], float]) -> Figure:
        return Figure.of([value(one) for one in rounds])

    def cpu(process: str) -> Figure:
        return over(lambda one: one[64].cpu_us[process])

    return RowFigures(
        p50=over(lambda one: one[1].p50_us),
        p99=over(lambda one: one[1].p99_us),
        at_64=over(lambda one: one[64].per_second),
        at_256=over(lambda one: one[256].per_second),
        worker_cpu=cpu("worker"),
        client_cpu=cpu("client"),
        broker_cpu=cpu("broker") if "broker" in rounds[0][64].cpu_us else None,
        memory=over(lambda one: max(sample.resident["worker"] for sample in one.values()) / 1e6),
    )


def ratio(
    mine: Sequence[T],
    other: Sequence[T],
    value: Callable[[T], float],
    of_other: Callable[[T], float] | None = None,
) -> Figure:
    """Return by how much ``value`` of one row is that of another: round by round, then the median.

    ``of_other`` is what is taken of the other row, where that is something else.

    Both rows of a round ran within seconds of each other, so a machine that is slow for a while weighs on
    both.
    """
    of_other = of_other or value
    return Figure.of([value(one) / of_other(two) for one, two in zip(mine, other, strict=True)])


def rounds_of(rows: Mapping[str, Any]) -> dict[str, Rounds]:
    """Read the samples of each row as JSON has them."""
    return {
        row: [{int(tasks): Sample(**sample) for tasks, sample in one.items()} for one in rounds]
        for row, rounds in rows.items()
    }
