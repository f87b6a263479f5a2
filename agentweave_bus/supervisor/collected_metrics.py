"""One page of metrics for all workers: what each exposes, added up by agent, and what the supervisor knows.

A scrape of a single worker misses the others, and one of each replica makes series for every process that
ever was. So here the replicas of an agent are one: counters and histograms are added, the label ``agent``
says whose. What a worker had counted before it ended is kept, as of its last word or else the last scrape: a
sum that went down would look like a process that began anew, and every rate over it would be wrong.

What a worker exposes is its own word. It can't change what another's means, nor keep the others' from whoever
scrapes, and what is kept of it has a bound. So of families that can't be on one page, as two types of one
name, one is left out: the supervisor's own come first, then those that this project declares, then those that
most workers have; of equal ones, that of the worker which has been seen for longest.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.supervisor.fetching import fetch_all
from agentweave_bus.supervisor.place import PlaceState

__all__ = ["CollectedMetrics"]

_log = logging.getLogger(__name__)

_LEAST: Final = frozenset(
    {
        "agentweave_certificate_expiry_timestamp_seconds",
        "agentweave_svid_valid_seconds",
        "agentweave_ready",
    }
)
"""Gauges of which the least counts: that of who is worst off."""
_GREATEST: Final = frozenset(
    {
        "agentweave_authz_circuit_breaker_state",
        "agentweave_authz_endpoint_circuit_breaker_state",
        "agentweave_event_loop_lag_seconds",
        "agentweave_queue_depth",
    }
)
"""Gauges of which the greatest counts: what is 0 or 1 is so for the agent when it is so for a replica, and
a queue is the same one, seen by each replica."""

_ADDS_UP: Final = frozenset({"counter", "histogram", "summary"})
_SUFFIXES: Final = {
    "counter": ("_total", "_created"),
    "gauge": (),
    "histogram": ("_bucket", "_count", "_sum", "_created"),
    "summary": ("_count", "_sum", "_created"),
    "unknown": (),
}
"""Of each type, what it may add to its family's name."""
_BOUNDS: Final = {"histogram": "le", "summary": "quantile"}
"""The labels that are numbers."""
_NAME: Final = re.compile("[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL: Final = re.compile("[a-zA-Z_][a-zA-Z0-9_]*")
"""What every format writes as it is. Other names and labels are rewritten, and then two may be the same."""
_MOST_NAMED: Final = 5
_LET_GO: Final = 256
_MOST_KEPT: Final = 20_000
"""Series of workers that have ended, of each agent."""


class _Family(NamedTuple):
    name: str
    kind: str

    def names(self) -> frozenset[str]:
        """Return what no other family on the same page may be called, nor have as a sample's name."""
        return frozenset((self.name, *(self.name + suffix for suffix in _SUFFIXES[self.kind])))


_Key = tuple[_Family, str, tuple[tuple[str, str], ...]]
"""Family, sample, labels."""

_Samples = dict[_Key, float]


class _Page(NamedTuple):
    """What a worker exposed; ``about`` has the families' help texts."""

    samples: _Samples
    about: dict[_Family, str]


class CollectedMetrics(Collector):
    """Collects from the workers at every scrape.

    ``status`` and ``leaving`` return what the methods of that name of
    :class:`~agentweave_bus.supervisor.supervisor.Supervisor` do; they are called on a thread of the listener.
    ``counted`` gets the last pages of workers that end, with agent and process; they are taken from there.
    What a worker that is leaving has counted goes on to count by itself until it has ended.
    """

    def __init__(
        self,
        status: Callable[[], list[dict[str, Any]]],
        leaving: Callable[[], frozenset[tuple[str, int]]],
        counted: deque[tuple[str, int, str]],
    ) -> None:
        self.registry = CollectorRegistry()
        self._status = status
        self._who_is_leaving = leaving
        self._leaving: frozenset[tuple[str, int]] = frozenset()
        self._counted = counted
        self._lock = threading.Lock()
        self._asked_at = float("-inf")
        self._last: dict[tuple[str, int], _Page] = {}
        self._gone: dict[str, _Page] = {}
        self._let_go: deque[tuple[str, int]] = deque(maxlen=_LET_GO)
        """Of whom the sums hold all that there will be."""
        self._restarts: dict[str, dict[str, tuple[int, int]]] = {}
        """By agent and place: how many there were at places of that name before, and at the present one."""
        self._declared = frozenset(_Family(one.name, one.type) for one in Metrics.create().registry.collect())
        self._left_out: frozenset[_Family] = frozenset()
        self.registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing is known before somebody asks: registering must not scrape."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Ask every worker, and return the sums.

        Whoever had to wait for another to be answered gets what that one asked for. So it ends, too, where a
        worker names this very page as its own.
        """
        came_at = time.monotonic()
        with self._lock:
            workers = self._status()
            self._leaving = self._who_is_leaving()  # after it: who leaves in between is in both
            self._hear_last()
            if self._asked_at < came_at:
                self._ask(workers)
                self._asked_at = time.monotonic()
            own = list(self._own(workers))
            yield from self._sums(frozenset().union(*(_Family(one.name, one.type).names() for one in own)))
            yield from own

    # --- the workers' own --------------------------------------------------------------------------------

    def _hear_last(self) -> None:
        """Take what workers said as they ended, unless they were let go before that."""
        while self._counted:
            agent, pid, page = self._counted.popleft()
            if (agent, pid) not in self._let_go:
                self._note((agent, pid), page)

    def _note(self, who: tuple[str, int], page: str) -> None:
        try:
            self._last[who] = _read(page)
        except Exception as error:  # noqa: BLE001 - the parser is not made for pages of strangers
            _log.warning("the metrics of %s (process %d) can't be read: %s", *who, error)

    def _ask(self, workers: list[dict[str, Any]]) -> None:
        living = {(one["agent"], one["pid"]): one["metrics"] for one in workers if one["pid"] is not None}
        for who in self._last.keys() - living.keys() - self._leaving:
            self._let_go.append(who)
            kept, last = self._gone.setdefault(who[0], _Page({}, {})), self._last.pop(who)
            for key, value in last.samples.items():
                if key[0].kind in _ADDS_UP and (key in kept.samples or len(kept.samples) < _MOST_KEPT):
                    kept.samples[key] = kept.samples.get(key, 0.0) + value
                    kept.about[key[0]] = last.about[key[0]]
        asked = {key: url for key, url in living.items() if url is not None}
        for who, page in zip(asked, fetch_all(asked.values()), strict=True):
            if page is None or page.status != HTTPStatus.OK:
                continue  # what it said last goes on to count
            self._note(who, page.text)

    def _sums(self, taken: frozenset[str]) -> Iterator[Metric]:
        """Return the sums of the families that have none of the names that are ``taken``."""
        sums: dict[_Family, _Samples] = {}
        about: dict[_Family, str] = {}
        had: Counter[_Family] = Counter()
        for agent, page in self._by_agent():
            had.update(list(dict.fromkeys(key[0] for key in page.samples)))  # in their order
            for (family, name, labels), value in page.samples.items():
                about.setdefault(family, page.about[family])
                key = (family, name, (*(one for one in labels if one[0] != "agent"), ("agent", agent)))
                into = sums.setdefault(family, {})
                into[key] = self._joined(family.name, into.get(key), value)
        shown, left_out = self._settled(had, taken)
        self._tell_left_out(left_out, sums)
        for family in shown:
            metric = Metric(family.name, about[family], family.kind)
            for (_, name, labels), value in sums[family].items():
                metric.add_sample(name, dict(labels), value)
            yield metric

    def _settled(self, had: Counter[_Family], taken: frozenset[str]) -> tuple[list[_Family], list[_Family]]:
        """Return the families that can be on one page, and the others.

        ``had`` tells how many have each; of those that as many have, the first goes before.
        """
        names = set(taken)
        shown: list[_Family] = []
        left_out: list[_Family] = []
        for family in sorted(had, key=lambda one: (one not in self._declared, -had[one])):
            if names.isdisjoint(family.names()):
                names |= family.names()
                shown.append(family)
            else:
                left_out.append(family)
        return shown, left_out

    def _tell_left_out(self, left_out: list[_Family], sums: dict[_Family, _Samples]) -> None:
        """Log what is left out, once for as long as it is."""
        fresh = [one for one in left_out if one not in self._left_out]
        for family in fresh[:_MOST_NAMED]:
            agents = sorted({dict(labels)["agent"] for _, _, labels in sums[family]})
            _log.warning(
                "%s as a %s is left out, as another metric has that name: it is of %s",
                *family,
                ", ".join(agents),
            )
        if len(fresh) > _MOST_NAMED:
            _log.warning("so are %d more", len(fresh) - _MOST_NAMED)
        self._left_out = frozenset(left_out)

    def _by_agent(self) -> Iterator[tuple[str, _Page]]:
        """Return the pages, those of who is there first."""
        for who, page in self._last.items():
            yield who[0], _adding_up(page) if who in self._leaving else page
        yield from self._gone.items()

    def _joined(self, family: str, one: float | None, other: float) -> float:
        if one is None:
            return other
        if family in _LEAST:
            return min(one, other)
        return max(one, other) if family in _GREATEST else one + other

    # --- what the supervisor knows -----------------------------------------------------------------------

    def _own(self, workers: list[dict[str, Any]]) -> Iterator[Metric]:
        agents = sorted({one["agent"] for one in workers})
        states = GaugeMetricFamily("agentweave_workers", "Places of workers.", labels=["agent", "state"])
        restarts = CounterMetricFamily(
            "agentweave_worker_restarts", "Workers started again or replaced.", labels=["agent"]
        )
        lag = GaugeMetricFamily(
            "agentweave_worker_event_loop_lag_seconds",
            "By how much the event loop of the slowest worker was late.",
            labels=["agent"],
        )
        memory = GaugeMetricFamily(
            "agentweave_worker_resident_bytes", "Memory of the largest worker.", labels=["agent"]
        )
        svid = GaugeMetricFamily(
            "agentweave_worker_svid_valid_seconds",
            "For how long the SVID that expires first is still valid.",
            labels=["agent"],
        )
        for agent in agents:
            mine = [one for one in workers if one["agent"] == agent]
            for state in PlaceState:
                states.add_metric([agent, state], sum(one["state"] == state for one in mine))
            seen = self._restarts.setdefault(agent, {})
            for one in mine:  # places that are gone go on to count, also where another has their name
                before, last = seen.get(one["name"], (0, 0))
                seen[one["name"]] = (before + (last if one["restarts"] < last else 0), one["restarts"])
            restarts.add_metric([agent], sum(before + last for before, last in seen.values()))
            beats = [one["beat"] for one in mine if one["beat"] is not None]
            if beats:
                lag.add_metric([agent], max(beat["lag_s"] for beat in beats))
                memory.add_metric([agent], max(beat["resident"] for beat in beats))
                svid.add_metric([agent], min(beat["svid_s"] or 0.0 for beat in beats))
        yield from (states, restarts, lag, memory, svid)


def _adding_up(page: _Page) -> _Page:
    return _Page({key: value for key, value in page.samples.items() if key[0].kind in _ADDS_UP}, page.about)


def _read(text: str) -> _Page:
    """Read what a worker exposes.

    Raises:
        ValueError: it is not what can be put together with what others expose, and written again.
        OverflowError: a value is no number that others can read.

    """
    page = _Page({}, {})
    for one in text_string_to_metric_families(text):
        family = _Family(one.name, one.type)
        if one.type not in _SUFFIXES:
            raise ValueError(f"the format has no type {one.type!r}")
        page.about[family] = one.documentation
        names = family.names()
        for sample in one.samples:
            if sample.name not in names:
                raise ValueError(f"{sample.name} is none of {one.name}")
            if not (_NAME.fullmatch(one.name) and all(map(_LABEL.fullmatch, sample.labels))):
                raise ValueError(f"{one.name} or a label of it has a name that not every format has")
            if not sample.name.endswith("_created"):
                labels = _with_bounds(one.type, sample.labels)
                page.samples[family, sample.name, tuple(sorted(labels.items()))] = float(sample.value)
    return page


def _with_bounds(kind: str, labels: dict[str, str]) -> dict[str, str]:
    """Return labels with that which has to be a number written as the other readers know it."""
    bound = _BOUNDS.get(kind)
    if bound not in labels:
        return labels
    return {**labels, bound: floatToGoString(labels[bound])}  # type: ignore[no-untyped-call]
