"""The metrics of all workers as one page; each worker here is a real listener with a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from agentweave_bus.config import MetricsConfig
from agentweave_bus.observability.exposition import Exposition
from agentweave_bus.observability.metrics import Direction, Metrics, RequestStatus
from agentweave_bus.supervisor.collected_metrics import CollectedMetrics


class Worker:
    """A process with metrics, as far as the supervisor sees it."""

    def __init__(self, agent: str, pid: int, place: str) -> None:
        self.metrics = Metrics.create()
        self.agent, self.pid, self.place = agent, pid, place
        self.restarts = 0
        well = lambda: (True, {})  # noqa: E731
        self.listener = Exposition(MetricsConfig(port=0), self.metrics, health=well, ready=well)

    def handled(self, count: int) -> None:
        for _ in range(count):
            self.metrics.request_ended(Direction.INBOUND, "greet", RequestStatus.SUCCESS, 0.01)

    def status(self) -> dict[str, Any]:
        beat = {"lag_s": self.pid / 1000, "resident": self.pid, "svid_s": float(self.pid)}
        url = f"http://127.0.0.1:{self.listener.port}/metrics"
        return {
            "name": self.place, "agent": self.agent, "pid": self.pid, "state": "ready", "metrics": url,
            "restarts": self.restarts, "beat": beat,
        }  # fmt: skip


class Fleet:
    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.workers: list[Worker] = []
        self.collected = CollectedMetrics(lambda: [one.status() for one in self.workers])

    def start(self, agent: str, pid: int, place: str = "") -> Worker:
        worker = Worker(agent, pid, place or agent)
        worker.metrics.declare_capability(Direction.INBOUND, "greet")
        self._stack.enter_context(worker.listener)
        self.workers.append(worker)
        return worker

    def value(self, name: str, **labels: str) -> float:
        """The one sample of that name with these labels among its own."""
        text = generate_latest(self.collected.registry).decode()
        (found,) = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return found

    def completed(self, agent: str) -> float:
        return self.value(
            "agentweave_requests_total",
            agent=agent,
            capability="greet",
            status="success",
            direction="inbound",
        )


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with ExitStack() as stack:
        yield Fleet(stack)


def test_replicas_are_added_up_and_agents_kept_apart(fleet: Fleet) -> None:
    fleet.start("a", 1, "a/1").handled(2)
    fleet.start("a", 2, "a/2").handled(3)
    fleet.start("b", 3).handled(7)
    assert (fleet.completed("a"), fleet.completed("b")) == (5, 7)
    counted = {"agent": "a", "capability": "greet", "direction": "inbound"}
    assert fleet.value("agentweave_request_duration_seconds_count", **counted) == 5


def test_what_a_worker_had_counted_before_it_ended_goes_on_to_count(fleet: Fleet) -> None:
    first = fleet.start("a", 1)
    first.handled(4)
    first.metrics.in_flight(Direction.INBOUND).inc()
    assert fleet.value("agentweave_calls_in_flight", agent="a", direction="inbound") == 1
    fleet.workers.remove(first)
    fleet.start("a", 2).handled(1)
    assert fleet.completed("a") == 5
    assert fleet.value("agentweave_calls_in_flight", agent="a", direction="inbound") == 0


def test_one_that_does_not_answer_counts_as_it_did(fleet: Fleet) -> None:
    worker = fleet.start("a", 1)
    worker.handled(4)
    assert fleet.completed("a") == 4
    url = worker.status()["metrics"]
    worker.listener.close()
    worker.status = lambda: {**Worker.status(worker), "metrics": url}  # type: ignore[method-assign]
    assert fleet.completed("a") == 4


def test_gauges_of_the_worst(fleet: Fleet) -> None:
    for pid in (1, 2):
        worker = fleet.start("a", pid, f"a/{pid}")
        worker.metrics.certificate_expiry.set(1000 * pid)
    assert fleet.value("agentweave_certificate_expiry_timestamp_seconds", agent="a") == 1000
    closed = {"agent": "a", "state": "closed"}
    assert fleet.value("agentweave_authz_circuit_breaker_state", **closed) == 1
    assert fleet.value("agentweave_worker_event_loop_lag_seconds", agent="a") == 0.002
    assert fleet.value("agentweave_worker_resident_bytes", agent="a") == 2
    assert fleet.value("agentweave_worker_svid_valid_seconds", agent="a") == 1


def test_what_the_supervisor_knows(fleet: Fleet) -> None:
    one, two = fleet.start("a", 1, "a/1"), fleet.start("a", 2, "a/2")
    one.restarts, two.restarts = 3, 1
    assert fleet.value("agentweave_workers", agent="a", state="ready") == 2
    assert fleet.value("agentweave_workers", agent="a", state="given up") == 0
    assert fleet.value("agentweave_worker_restarts_total", agent="a") == 4
    fleet.workers.remove(two)  # scaled down
    assert fleet.value("agentweave_worker_restarts_total", agent="a") == 4
