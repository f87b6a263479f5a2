"""The metrics of all workers as one page; each worker here is a real listener with a registry of its own."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from agentweave_bus.config import MetricsConfig
from agentweave_bus.embedded.nats_server import tools_directory
from agentweave_bus.observability.exposition import Exposition
from agentweave_bus.observability.metrics import Direction, Metrics, RequestStatus
from agentweave_bus.supervisor.collected_metrics import CollectedMetrics

PROMTOOL = shutil.which("promtool", path=os.pathsep.join((str(tools_directory()), os.environ["PATH"])))
UNREADABLE = 1
"""As ``promtool`` ends for a page that it can't read; what it only thinks unwise is another number."""


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
        self.counted: deque[tuple[str, int, str]] = deque()
        self.leaving: list[Worker] = []
        self.said: dict[int, dict[str, Any]] = {}
        self.collected = CollectedMetrics(
            lambda: [*(one.status() for one in self.workers), *self.said.values()],
            lambda: frozenset((one.agent, one.pid) for one in self.leaving),
            self.counted,
        )

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

    def say(self, agent: str, pid: int, page: str) -> None:
        """Have one that is not asked say what it counts; it is there until its line of ``said`` is gone."""
        self.counted.append((agent, pid, page))
        self.said[pid] = {
            "name": f"{agent}/{pid}", "agent": agent, "pid": pid, "state": "ready", "metrics": None,
            "restarts": 0, "beat": None,
        }  # fmt: skip

    def types(self) -> dict[str, str]:
        """The type of each family on the page, which every reader of it can read."""
        page = generate_latest(self.collected.registry)
        lines = [line.split() for line in page.decode().splitlines() if line.startswith("# TYPE ")]
        assert len({name for _, _, name, _ in lines}) == len(lines)
        list(text_string_to_metric_families(page.decode()))
        if PROMTOOL is not None:
            checked = subprocess.run(
                [PROMTOOL, "check", "metrics"], input=page, capture_output=True, check=False
            )
            assert checked.returncode != UNREADABLE, checked.stderr
        return {name: kind for _, _, name, kind in lines}

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
        worker.metrics.svid_valid.set(10 * pid)
        worker.metrics.event_loop_lag.set(pid)
        worker.metrics.ready.labels("policy").set(pid - 1)
    assert fleet.value("agentweave_certificate_expiry_timestamp_seconds", agent="a") == 1000
    assert fleet.value("agentweave_svid_valid_seconds", agent="a") == 10
    assert fleet.value("agentweave_event_loop_lag_seconds", agent="a") == 2
    assert fleet.value("agentweave_ready", agent="a", part="policy") == 0
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


def test_a_queue_is_the_same_one_for_each_replica_that_sees_it(fleet: Fleet) -> None:
    for pid, depth in ((1, 7), (2, 9)):
        fleet.start("a", pid).metrics.queue_depth.labels("greet").set(depth)
    assert fleet.value("agentweave_queue_depth", agent="a", capability="greet") == 9


def test_what_a_worker_said_as_it_ended_counts_once(fleet: Fleet) -> None:
    """Whether it was scraped before or not, and not again if it comes after the worker was let go."""
    known, unknown, late = (fleet.start("a", pid, f"a/{pid}") for pid in (1, 2, 3))
    known.handled(4)
    late.handled(8)
    fleet.workers.remove(unknown)
    assert fleet.completed("a") == 12
    for worker in (known, unknown):
        worker.handled(1)
        fleet.counted.append(("a", worker.pid, generate_latest(worker.metrics.registry).decode()))
    fleet.workers.clear()
    fleet.start("a", 4)
    assert fleet.completed("a") == 14
    fleet.counted.append(("a", late.pid, generate_latest(late.metrics.registry).decode()))
    fleet.counted.append(("a", 5, "nonsense {"))
    assert (fleet.completed("a"), len(fleet.counted)) == (14, 0)


def test_what_a_worker_counts_after_another_took_its_place_counts_too(fleet: Fleet) -> None:
    old = fleet.start("a", 1)
    old.metrics.queue_depth.labels("greet").set(7)
    old.handled(4)
    assert fleet.completed("a") == 4
    fleet.workers.remove(old)
    fleet.leaving.append(old)
    fresh = fleet.start("a", 2)
    fresh.metrics.queue_depth.labels("greet").set(3)
    fresh.handled(1)
    assert fleet.completed("a") == 5
    assert fleet.value("agentweave_queue_depth", agent="a", capability="greet") == 3  # as it is now
    old.handled(2)  # what it was doing
    fleet.counted.append(("a", old.pid, generate_latest(old.metrics.registry).decode()))
    fleet.leaving.clear()
    assert [fleet.completed("a") for _ in range(2)] == [7, 7]


def test_restarts_at_a_place_that_comes_again_are_added(fleet: Fleet) -> None:
    worker = fleet.start("a", 1, "a/2")
    for restarts, counted in ((3, 3), (4, 4), (0, 4), (1, 5)):
        worker.restarts = restarts
        assert fleet.value("agentweave_worker_restarts_total", agent="a") == counted


def test_a_worker_that_says_nonsense_keeps_nobody_elses_from_being_seen(fleet: Fleet) -> None:
    fleet.start("a", 1).handled(4)
    fleet.counted.append(("b", 2, '{"#a.b",\t="y"} 1\n'))  # the parser raises no ValueError for it
    assert fleet.completed("a") == 4


def test_a_worker_can_not_say_what_anothers_metrics_are(fleet: Fleet) -> None:
    honest = fleet.start("a", 1)
    honest.handled(4)
    assert fleet.completed("a") == 4
    fleet.counted.append(("b", 2, "# TYPE agentweave_requests gauge\nagentweave_requests 1\n"))
    fleet.workers.clear()
    assert fleet.completed("a") == 4


def test_names_that_are_others_each_time_are_not_kept(fleet: Fleet) -> None:
    held = fleet.collected
    for pid in range(3):
        page = "".join(
            f"# TYPE f{pid}_{number}_total counter\nf{pid}_{number}_total 1\n" for number in range(9_000)
        )
        fleet.counted.append(("b", pid, page))
    list(held.collect())
    list(held.collect())
    assert sum(len(page.samples) for page in (*held._gone.values(), *held._last.values())) == 20_000


@pytest.mark.slow  # it waits for time to pass
def test_a_worker_that_names_the_supervisors_page_as_its_own(fleet: Fleet) -> None:
    def well() -> tuple[bool, dict[str, Any]]:
        return True, {}

    fleet.start("a", 1).handled(4)
    with Exposition(MetricsConfig(port=0), fleet.collected, health=well, ready=well) as own:
        asked: list[float] = []
        ask, evil = fleet.collected._ask, fleet.start("b", 2)
        url = f"http://127.0.0.1:{own.port}/metrics"
        evil.status = lambda: {**Worker.status(evil), "metrics": url}  # type: ignore[method-assign]

        def counting(workers: list[dict[str, Any]]) -> None:
            asked.append(0.0)
            ask(workers)

        fleet.collected._ask = counting  # type: ignore[method-assign]
        assert fleet.completed("a") == 4
        assert fleet.completed("a") == 4
        assert len(asked) == 2


@pytest.mark.parametrize(
    "page",
    [
        f"boom_total {'9' * 400}\n",
        '# TYPE boom histogram\nboom_bucket{le="many"} 1\n',
        "# TYPE boom histogram\nboom_count 1\n# TYPE boom gauge\n",
        "# TYPE boom info\nboom 1\n",
        '# TYPE "agentweave.workers" gauge\n{"agentweave.workers"} 1\n',
        'boom{"a:b"="1",a_b="2"} 1\n',
    ],
    ids=["a number that is none", "a bound", "another's sample", "a type", "a name", "a label"],
)
def test_what_can_not_be_written_again_is_the_unreadable_page_of_who_says_it(
    fleet: Fleet, page: str, caplog: pytest.LogCaptureFixture
) -> None:
    fleet.start("a", 1).handled(4)
    fleet.say("b", 2, "# TYPE good_total counter\ngood_total 1\n" + page)
    assert not {"good_total", "boom", "boom_total"} & fleet.types().keys()
    assert fleet.completed("a") == 4
    assert "the metrics of b (process 2) can't be read" in caplog.text


@pytest.mark.parametrize("first", [1, 3])
def test_one_worker_can_not_make_a_page_of_two_types_for_a_name(
    fleet: Fleet, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor take a name from those who are more, from what is known to be of another type, or the supervisor."""
    fleet.start("a", 5).handled(4)
    honest = '# TYPE good_total counter\ngood_total 1\n# TYPE time histogram\ntime_bucket{le="+Inf"} 1\n'
    expected = {
        "agentweave_workers": "gauge",
        "agentweave_worker_restarts_total": "counter",
        "agentweave_requests_total": "counter",
        "good_total": "counter",
        **dict.fromkeys(("time_bucket", "time_count", "time_sum")),
    }
    evil = "".join(f"# TYPE {name} gauge\n{name} 7\n" for name in (*expected, "own"))
    others = [pid for pid in (1, 2, 3) if pid != first]
    for pid in (first, *others):
        fleet.say("b", pid, evil if pid == 1 else honest)
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        types = fleet.types()
        assert {name: types.get(name) for name in expected} == expected
        assert (types["time"], types["own"]) == ("histogram", "gauge")
        assert (fleet.value("good_total", agent="b"), fleet.completed("a")) == (2, 4)
        assert fleet.value("agentweave_workers", agent="b", state="ready") == 3
    assert sum("is left out" in one for one in caplog.messages) == 5  # each once, and how many more there are
    assert "good_total as a gauge is left out, as another metric has that name: it is of b\n" in caplog.text
    assert "so are 2 more" in caplog.text


def test_of_two_types_that_as_many_have_the_one_that_was_there_first_stays(fleet: Fleet) -> None:
    fleet.say("b", 1, "# TYPE good_total counter\ngood_total 1\n")
    fleet.say("c", 2, "# TYPE good_total gauge\ngood_total 1\n")
    assert fleet.types()["good_total"] == "counter"
    fleet.say("b", 1, "# TYPE good_total counter\ngood_total 2\n")
    assert fleet.types()["good_total"] == "counter"
    fleet.said.clear()  # both have ended
    fleet.say("c", 3, "# TYPE good_total gauge\ngood_total 1\n")
    assert fleet.types()["good_total"] == "gauge"  # of who is there


def test_whose_metrics_they_are_is_not_for_a_worker_to_say(fleet: Fleet) -> None:
    fleet.say("b", 2, 'good_total{agent="a"} 1\ngood_total{agent="c"} 2\n')
    assert fleet.value("good_total", agent="b") == 3
