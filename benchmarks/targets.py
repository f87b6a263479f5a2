"""What this project wants to reach, as ratios within one run, and whether a run has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks.load import Sample
from benchmarks.results import Figure, Rounds, figures_of, ratio

__all__ = ["TARGETS", "Target", "Verdict", "judge"]

_Measure = Callable[[Mapping[int, Sample]], float]


def p50(one: Mapping[int, Sample]) -> float:
    """Return the sequential p50 in microseconds."""
    return one[1].p50_us


def at_64(one: Mapping[int, Sample]) -> float:
    """Return the calls a second with 64 in flight."""
    return one[64].per_second


@dataclass(frozen=True, slots=True)
class Target:
    """``row``'s ``measure`` against that of ``base``: at most or at least ``bound`` times as much."""

    row: str
    base: str
    measure: _Measure
    bound: float
    at_most: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target in words, what was found, and whether that is good enough."""

    wanted: str
    found: Figure
    met: bool


TARGETS: Final = (
    Target("safe", "raw", p50, 2.0, at_most=True),
    Target("safe", "faststream", p50, 1.3, at_most=True),
    Target("safe", "faststream-quiet", p50, 1.3, at_most=True),
    Target("safe", "raw", at_64, 0.35, at_most=False),
    Target("safe", "faststream", at_64, 2.0, at_most=False),
    Target("safe", "faststream-quiet", at_64, 2.0, at_most=False),
    Target("safe", "a2a", at_64, 8.0, at_most=False),
    Target("claimed", "raw", at_64, 0.18, at_most=False),
)

MEMORY_MB: Final = 110.0
_NAMES: Final[Mapping[_Measure, str]] = {p50: "sequential p50", at_64: "throughput, 64 in flight"}


def judge(found: Mapping[str, Rounds]) -> Iterator[Verdict]:
    """Compare a run with the targets whose rows it has. What counts is the median of the rounds."""
    for target in TARGETS:
        if target.row in found and target.base in found:
            figure = ratio(found[target.row], found[target.base], target.measure)
            met = figure.median <= target.bound if target.at_most else figure.median >= target.bound
            limit = "at most" if target.at_most else "at least"
            wanted = f"{target.row}: {_NAMES[target.measure]} {limit} {target.bound:g} x {target.base}"
            yield Verdict(wanted, figure, met)
    if "safe" in found:
        memory = figures_of(found["safe"]).memory
        yield Verdict(f"safe: worker's memory under {MEMORY_MB:g} MB", memory, memory.median < MEMORY_MB)
