"""Each query of ``deploy/observability`` finds what a real worker under a real supervisor exposes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import anyio.to_thread
import pytest
import yaml

from tests.integration.probes import CLI, ECHO
from tests.integration.promql import Exposed, WrongQueryError, filled_in
from tests.integration.scraping import fetched, samples
from tests.integration.test_supervise import supervision
from tests.integration.world import World

pytestmark = pytest.mark.anyio

FOLDER = Path(__file__).parents[2] / "deploy" / "observability"
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
RULES = yaml.safe_load((FOLDER / "alert-rules.yaml").read_text())


class Query(NamedTuple):
    """A query, where it stands, and the labels that its text for people names."""

    place: str
    text: str
    named: frozenset[str]


def queries() -> Iterator[Query]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            named = frozenset(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            yield Query(panel["title"], filled_in(target["expr"]), named)
    for rule in (rule for group in RULES["groups"] for rule in group["rules"]):
        told = " ".join(rule["annotations"].values())
        yield Query(rule["alert"], rule["expr"], frozenset(re.findall(r"\$labels\.(\w+)", told)))


def variables() -> Iterator[tuple[str, str]]:
    """Return the series, and the label of it, that the choices of the dashboard are taken from."""
    for one in DASHBOARD["templating"]["list"]:
        if one["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), (\w+)\)", one["definition"])
            assert match is not None, one
            yield match[1], match[2]


async def page(world: World, folder: Path) -> str:
    """Return what a supervisor exposes whose worker has had a call and a task."""
    cli = await world.client(CLI)
    async with supervision(world, folder, {"health": {"beat": 0.1}}) as one:
        told = await one.ready()
        await one.until(lambda now: all(each["beat"] is not None for each in now))
        await cli.ask(ECHO, "say", {"text": "x"})
        handle = await cli.client.submit(str(ECHO), "work", {"text": "x"})
        await handle.result(timeout=30)
        with anyio.fail_after(30):
            while True:
                _, text = await anyio.to_thread.run_sync(fetched, told["metrics"])
                if "agentweave_queue_depth{" in text:  # what waits is asked for with the beats
                    return text
                await anyio.sleep(0.05)


def wrong(exposed: Exposed, query: Query) -> str | None:
    try:
        labels = exposed.labels_of(query.text)
    except WrongQueryError as error:
        return f"{query.place}: {error}"
    return None if query.named <= labels else f"{query.place} names {sorted(query.named - labels)}"


async def test_every_query_finds_what_is_exposed(world: World, tmp_path: Path) -> None:
    text = await page(world, tmp_path)
    exposed = Exposed.of(samples(text))
    known = list(queries())
    assert len(known) > 60
    assert [told for one in known if (told := wrong(exposed, one)) is not None] == []
    for selector, label in variables():
        assert label in exposed.labels_of(filled_in(selector))
    found_out(exposed)


def found_out(exposed: Exposed) -> None:
    """The check finds what may go wrong, each in a query that is right but for that."""
    for query, error in {
        "sum(rate(agentweave_request_total[5m]))": "nothing exposes",
        "sum(rate(agentweave_requests_total[5m])": "unclosed",
        'agentweave_requests_total{stat="error"}': "no label stat",
        'agentweave_requests_total{status="errors"}': "never errors",
        'agentweave_ready{part=~"subscribed|recieving"}': "never recieving",
        "sum by (state) (rate(agentweave_requests_total[5m]))": "aggregated by",
        "histogram_quantile(0.9, sum by (agent) (rate(agentweave_request_duration_seconds_bucket[5m])))": "le",
        "sum by (agent) (agentweave_workers) / sum by (state) (agentweave_workers)": "never match",
        "agentweave_ready unless on (state) agentweave_workers": "not both sides",
    }.items():
        with pytest.raises(WrongQueryError, match=error):
            exposed.labels_of(query)
    told = wrong(exposed, Query("here", "sum by (agent) (agentweave_workers)", frozenset({"state"})))
    assert told == "here names ['state']"
