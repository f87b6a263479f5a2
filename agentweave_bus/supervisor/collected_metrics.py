"""One page of metrics for all workers: what each exposes, added up by agent, and what the supervisor knows.

A scrape of a single worker misses the others, and one of each replica makes series for every process that
ever was. So here the replicas of an agent are one: counters and histograms are added, the label ``agent``
says whose. What a worker had counted before it ended is kept, as of the last scrape: a sum that went down
would look like a process that began anew, and every rate over it would be wrong.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from agentweave_bus.supervisor.place import PlaceState

__all__ = ["CollectedMetrics"]

_log = logging.getLogger(__name__)

_FETCH_S: Final = 2.0
_MAX_BYTES: Final = 8 * 1024 * 1024
_PART_BYTES: Final = 65_536
_AT_ONCE: Final = 8

_LEAST: Final = frozenset({"agentweave_certificate_expiry_timestamp_seconds"})
"""Gauges of which the least counts: that of who is worst off."""
_GREATEST: Final = frozenset(
    {"agentweave_authz_circuit_breaker_state", "agentweave_authz_endpoint_circuit_breaker_state"}
)
"""Gauges that are 0 or 1: so it is for the agent when it is so for a replica."""

_Key = tuple[str, str, tuple[tuple[str, str], ...]]
"""Family, sample, labels."""

_Samples = dict[_Key, float]


class _Family(NamedTuple):
    kind: str
    help: str


class CollectedMetrics(Collector):
    """Collects from the workers at every scrape.

    ``status`` returns what :meth:`~agentweave_bus.supervisor.supervisor.Supervisor.status` does; it is called
    on a thread of the listener.
    """

    def __init__(self, status: Callable[[], list[dict[str, Any]]]) -> None:
        self.registry = CollectorRegistry()
        self._status = status
        self._lock = threading.Lock()
        self._families: dict[str, _Family] = {}
        self._last: dict[tuple[str, int], _Samples] = {}
        self._gone: dict[str, _Samples] = {}
        self._restarts: dict[str, dict[str, int]] = {}
        self.registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing is known before somebody asks: registering must not scrape."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Ask every worker, and return the sums."""
        with self._lock:
            workers = self._status()
            self._ask(workers)
            yield from self._sums()
            yield from self._own(workers)

    # --- the workers' own --------------------------------------------------------------------------------

    def _ask(self, workers: list[dict[str, Any]]) -> None:
        living = {(one["agent"], one["pid"]): one["metrics"] for one in workers if one["pid"] is not None}
        for who in self._last.keys() - living.keys():
            kept = self._gone.setdefault(who[0], {})
            for key, value in self._last.pop(who).items():
                if self._adds_up(key[0]):
                    kept[key] = kept.get(key, 0.0) + value
        asked = {key: url for key, url in living.items() if url is not None}
        with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
            for who, text in zip(asked, pool.map(_fetched, asked.values()), strict=True):
                if text is None:
                    continue  # what it said last goes on to count
                try:
                    self._last[who] = self._read(text)
                except ValueError as error:
                    _log.warning("the metrics of %s (process %d) can't be read: %s", *who, error)

    def _read(self, text: str) -> _Samples:
        samples: _Samples = {}
        families = list(text_string_to_metric_families(text))
        for family in families:
            self._families[family.name] = _Family(family.type, family.documentation)
            for sample in family.samples:
                if not sample.name.startswith(family.name):
                    raise ValueError(f"{sample.name} is none of {family.name}")
                if not sample.name.endswith("_created"):
                    labels = tuple(sorted(sample.labels.items()))
                    samples[family.name, sample.name, labels] = sample.value
        return samples

    def _sums(self) -> Iterator[Metric]:
        sums: dict[str, dict[_Key, float]] = {}
        for agent, samples in self._by_agent():
            for (family, name, labels), value in samples.items():
                key = (family, name, (*labels, ("agent", agent)))
                into = sums.setdefault(family, {})
                into[key] = self._joined(family, into.get(key), value)
        for family, samples in sums.items():
            kind, about = self._families[family]
            metric = Metric(family, about, kind)
            for (_, name, labels), value in samples.items():
                metric.add_sample(name, dict(labels), value)
            yield metric

    def _by_agent(self) -> Iterator[tuple[str, Mapping[_Key, float]]]:
        yield from self._gone.items()
        for (agent, _), samples in self._last.items():
            yield agent, samples

    def _joined(self, family: str, one: float | None, other: float) -> float:
        if one is None:
            return other
        if family in _LEAST:
            return min(one, other)
        return max(one, other) if family in _GREATEST else one + other

    def _adds_up(self, family: str) -> bool:
        return self._families[family].kind in {"counter", "histogram", "summary"}

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
            for one in mine:  # places that are gone go on to count
                seen[one["name"]] = max(seen.get(one["name"], 0), one["restarts"])
            restarts.add_metric([agent], sum(seen.values()))
            beats = [one["beat"] for one in mine if one["beat"] is not None]
            if beats:
                lag.add_metric([agent], max(beat["lag_s"] for beat in beats))
                memory.add_metric([agent], max(beat["resident"] for beat in beats))
                svid.add_metric([agent], min(beat["svid_s"] or 0.0 for beat in beats))
        yield from (states, restarts, lag, memory, svid)


def _fetched(url: str) -> str | None:
    """Fetch a page over plain HTTP, within a few seconds for all of it; no redirect is followed."""
    until = time.monotonic() + _FETCH_S
    parts = urlsplit(url)
    try:
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError("it is no http:// address")  # noqa: TRY301
        with closing(HTTPConnection(parts.hostname, parts.port, timeout=_FETCH_S)) as connection:
            connection.request("GET", parts.path or "/")
            answer = connection.getresponse()
            if answer.status != HTTPStatus.OK:
                raise ValueError(f"it answers {answer.status}")  # noqa: TRY301
            page = bytearray()
            while part := answer.read1(_PART_BYTES):
                page += part
                if len(page) > _MAX_BYTES or time.monotonic() > until:
                    raise ValueError("it is too long, or takes too long")  # noqa: TRY301
            return page.decode()
    except (OSError, ValueError, HTTPException) as error:
        _log.info("the metrics at %s can't be had: %s", url, error)
        return None
