"""Counts that every call changes, several times: kept as plain numbers, and read when somebody asks.

prometheus_client takes a lock and several calls of its own for each change, which together cost a call more
than the check of its arguments. Here a change is an addition. How a metric is exposed, down to its series of
creation times, is still prometheus_client's: the metric itself is kept beside the numbers, with all of its
series at zero, and what it exposes gets the numbers filled in.

No lock is needed, because of two rules. Series are made and changed on one thread only, that of the event
loop of the process that counts; so no addition is lost. And a scrape, which runs on a thread of its own, only
reads, each number or list of them in one step; so it sees a number as it was before a change or after it. A
histogram's sum can be ahead of its buckets by what is being observed just then, as prometheus_client's can.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Final, Generic, TypeVar

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString

__all__ = ["Spread", "Tallied", "Tally"]

_Numbers = Mapping[tuple[str, str | None], float]
"""What a series exposes, by the ending of the sample's name and the upper bound of its bucket."""


class Tally:
    """The number of a counter or a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self) -> None:
        """Count one more."""
        self.value += 1

    def dec(self) -> None:
        """Count one less; not for counters."""
        self.value -= 1

    def numbers(self) -> _Numbers:
        """Return what to expose."""
        value = float(self.value)
        return {("", None): value, ("_total", None): value}


class Spread:
    """The numbers of a histogram whose buckets end at ``bounds``; one more has what is above them."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count ``value``."""
        self._sum += value
        self._counts[bisect_left(self._bounds, value)] += 1

    def count(self) -> int:
        """Return how often something was observed."""
        return sum(self._counts)

    def numbers(self) -> _Numbers:
        """Return what to expose."""
        reached = [float(count) for count in accumulate(self._counts[:])]  # of one instant: copied first
        ends: Iterable[str] = map(floatToGoString, (*self._bounds, INF))
        buckets: _Numbers = {("_bucket", end): count for end, count in zip(ends, reached, strict=True)}
        return {**buckets, ("_count", None): reached[-1], ("_sum", None): self._sum}


_S = TypeVar("_S", Tally, Spread)


class Tallied(Collector, Generic[_S]):
    """A metric whose series are tallies. ``make`` makes one.

    ``exposed`` is the metric as prometheus_client knows it, with these ``labels``. It is in no registry, and
    nobody else makes series of it.
    """

    def __init__(
        self, exposed: Counter | Gauge | Histogram, labels: tuple[str, ...], make: Callable[[], _S]
    ) -> None:
        self._exposed = exposed
        self._names = labels
        self._make: Final[Callable[[], _S]] = make
        self._series: dict[tuple[str, ...], _S] = {}
        if not labels:
            self.labels()  # there is this one only, and it is always exposed

    def labels(self, *values: str) -> _S:
        """Return the series with these values of the labels; from now on it is exposed."""
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = self._make()  # before it is exposed, so that a scrape finds it
            if values:
                self._exposed.labels(*values)
        return series

    def series(self) -> Iterable[_S]:
        """Return all that there are."""
        return self._series.values()

    def describe(self) -> Iterable[Metric]:
        """Return the metric without its numbers; a registry asks for the names."""
        return self._exposed.describe()

    def collect(self) -> Iterable[Metric]:
        """Return the metric with its numbers."""
        for family in self._exposed.collect():
            read: dict[tuple[str, ...], _Numbers] = {}
            for i, sample in enumerate(family.samples):
                values = tuple(sample.labels[name] for name in self._names)
                if values not in read:
                    read[values] = self._series[values].numbers()
                key = (sample.name.removeprefix(family.name), sample.labels.get("le"))
                family.samples[i] = sample._replace(value=read[values].get(key, sample.value))
            yield family
