"""What is tallied looks like what prometheus_client counts, and can be read while it is counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from agentweave_bus.observability.metrics import Declaration

DECLARED = {
    "asked": Declaration(Counter, "asked_total", "Questions.", ("who", "how")),
    "plain": Declaration(Counter, "plain_total", "Without labels."),
    "open": Declaration(Gauge, "open", "Open ones.", ("who",)),
    "took": Declaration(Histogram, "took_seconds", "How long.", ("who",), (0.001, 0.1, 1, 30)),
}


def page(exposed: Callable[[CollectorRegistry], bytes], *, tallied: bool) -> str:
    """Count some, and return what is exposed then, without the times at which series were created."""
    registry = CollectorRegistry()
    made = {name: replace(each, tallied=tallied).in_registry(registry) for name, each in DECLARED.items()}
    made["asked"].labels("nobody", "never")
    for number in range(50):
        made["asked"].labels(f"a{number % 3}", "twice").inc()
        made["open"].labels("b").inc()
        made["took"].labels(f"c{number % 2}").observe(number * number / 64)
    made["took"].labels("c0").observe(0.001)  # a bound belongs to the bucket that it ends
    made["took"].labels("c0").observe(-0.25)
    made["open"].labels("b").dec()
    if tallied:
        made["plain"].labels().inc()
    else:
        made["plain"].inc()
    return re.sub(r"(_created(?:{.*})?) .*", r"\1", exposed(registry).decode())


@pytest.mark.parametrize("exposed", [generate_latest, generate_openmetrics])
def test_what_is_tallied_is_exposed_as_by_prometheus_client(
    exposed: Callable[[CollectorRegistry], bytes],
) -> None:
    shown = page(exposed, tallied=True)
    assert shown == page(exposed, tallied=False)
    assert 'took_seconds_bucket{le="0.001",who="c0"} 3.0' in shown
    assert "took_seconds_created" in shown


def test_a_name_is_taken_once() -> None:
    registry = CollectorRegistry()
    replace(DECLARED["plain"], tallied=True).in_registry(registry)
    with pytest.raises(ValueError, match="plain"):
        DECLARED["plain"].in_registry(registry)


def test_buckets_and_count_are_of_one_instant_while_there_is_counting() -> None:
    registry = CollectorRegistry()
    took = replace(DECLARED["took"], tallied=True).in_registry(registry)

    def pages() -> Iterator[str]:
        while not counting.done():
            yield generate_latest(registry).decode()
        yield generate_latest(registry).decode()

    def count() -> None:
        for number in range(100_000):
            took.labels(f"c{number // 10_000}").observe(number % 4)

    with ThreadPoolExecutor(1) as threads:
        counting = threads.submit(count)
        for each in pages():
            reached = dict(re.findall(r'bucket{le="\+Inf",who="(c\d)"} (\S+)', each))
            assert reached == dict(re.findall(r'count{who="(c\d)"} (\S+)', each))
    assert reached == {f"c{i}": "10000.0" for i in range(10)}
