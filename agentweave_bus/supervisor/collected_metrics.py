"""One page of metrics for all workers: what each exposes, added up by agent, and what the supervisor knows.

A scrape of a single worker misses the others, and one of each replica makes series for every process that
ever was. So here the replicas of an agent are one: counters and histograms are added, the label ``agent``
says whose. What a worker had counted before it ended is kept, as of its last word or else the last scrape: a
sum that went down would look like a process that began anew, and every rate over it would be wrong.

What a worker exposes is its own word. It can't change what another's means, nor keep the others' from whoever
scrapes, and what is kept of it has a bound.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Any, Final, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

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
_LET_GO: Final = 256
_MOST_KEPT: Final = 20_000
"""Series of workers that have ended, of each agent."""


class _Family(NamedTuple):
    name: str
    kind: str


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
            yield from self._sums()
            yield from self._own(workers)

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

    def _sums(self) -> Iterator[Metric]:
        sums: dict[_Family, _Samples] = {}
        about: dict[_Family, str] = {}
        for agent, page in self._by_agent():
            about.update(page.about)
            for (family, name, labels), value in page.samples.items():
                key = (family, name, (*labels, ("agent", agent)))
                into = sums.setdefault(family, {})
                into[key] = self._joined(family.name, into.get(key), value)
        for family, samples in sums.items():
            metric = Metric(family.name, about[family], family.kind)
            for (_, name, labels), value in samples.items():
                metric.add_sample(name, dict(labels), value)
            yield metric

    def _by_agent(self) -> Iterator[tuple[str, _Page]]:
        yield from self._gone.items()
        for who, page in self._last.items():
            yield who[0], _adding_up(page) if who in self._leaving else page

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
    page = _Page({}, {})
    for one in text_string_to_metric_families(text):
        family = _Family(one.name, one.type)
        page.about[family] = one.documentation
        for sample in one.samples:
            if not sample.name.startswith(one.name):
                raise ValueError(f"{sample.name} is none of {one.name}")
            if not sample.name.endswith("_created"):
                page.samples[family, sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return page
