"""The dashboard can be imported and read: its shape, apart from what its queries find."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[3] / "deploy" / "observability" / "grafana-dashboard.json"
DASHBOARD = json.loads(FILE.read_text())
PANELS = DASHBOARD["panels"]
DRAWN = [panel for panel in PANELS if panel["type"] != "row"]
DATA_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24


def area(panel: dict[str, Any]) -> set[tuple[int, int]]:
    at = panel["gridPos"]
    return {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}


def test_it_is_one_of_the_classic_model_that_has_no_place_in_a_database_yet() -> None:
    assert DASHBOARD["schemaVersion"] >= 39
    assert DASHBOARD["id"] is None
    assert re.fullmatch(r"[a-z-]{1,40}", DASHBOARD["uid"])
    assert DASHBOARD["title"]


def test_ids_are_unique() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    for panel in DRAWN:
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters)


def test_no_panel_covers_another_and_all_are_on_the_grid() -> None:
    for one, other in combinations(PANELS, 2):
        assert not area(one) & area(other), (one["title"], other["title"])
    assert all(at["x"] + at["w"] <= WIDTH for at in (panel["gridPos"] for panel in PANELS))
    tops = [panel["gridPos"]["y"] for panel in PANELS]
    assert tops == sorted(tops)  # rows have what stands below them


def test_everything_goes_through_the_chosen_data_source() -> None:
    (chosen,) = [one for one in DASHBOARD["templating"]["list"] if one["type"] == "datasource"]
    assert (chosen["name"], chosen["query"]) == ("datasource", "prometheus")
    for panel in DRAWN:
        assert panel["datasource"] == DATA_SOURCE
        assert all(target["datasource"] == DATA_SOURCE for target in panel["targets"])
    chosen_by = [one for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    assert [one["name"] for one in chosen_by] == ["instance", "agent"]
    assert all(one["datasource"] == DATA_SOURCE for one in chosen_by)


@pytest.mark.parametrize("panel", DRAWN, ids=[panel["title"] for panel in DRAWN])
def test_a_panel_can_be_read(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 20
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert 1 <= len(panel["targets"]) <= 6
    for target in panel["targets"]:
        assert target["legendFormat"]
        selected = re.findall(r"(?:{|\$)(\w*)=~", target["expr"])
        assert selected, "it does not heed what is chosen"
        for selector in re.findall(r"agentweave_\w+\{([^}]*)\}", target["expr"]):
            assert 'instance=~"$instance", agent=~"$agent"' in selector
        assert not re.search(r"agentweave_\w+(?![\w{])", target["expr"])
