"""The alerts: each is complete, is explained, and fires when it should and not before."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentweave_bus.embedded.nats_server import tools_directory
from tests.unit.observability.alert_cases import CASES

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "deploy" / "observability"
GROUPS = yaml.safe_load((FOLDER / "alert-rules.yaml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
PAGE = (ROOT / "docs" / "observability.md").read_text()

PROMTOOL = shutil.which("promtool", path=os.pathsep.join((str(tools_directory()), os.environ["PATH"])))
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="no promtool: 'make tools' fetches it on Debian")


def promtool(*words: str | Path) -> str:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_an_alert_says_how_bad_it_is_what_it_is_and_where_to_read_on(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"warning", "critical"}
    told = rule["annotations"]
    assert set(told) == {"summary", "description", "runbook_url"}
    assert told["runbook_url"] == f"docs/observability.md#{rule['alert'].lower()}"


def test_names_are_unique_and_each_has_its_section() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    (alerts,) = re.findall(r"^## Alerts\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^###? |\Z)", alerts, re.MULTILINE | re.DOTALL))
    assert list(sections) == names
    assert all(len(text.strip()) > 40 for text in sections.values())


FAQ = {
    'rate(agentweave_requests_total{status="error"}[5m])': "> 0.05",
    "rate(agentweave_authz_denied_total[5m])": "> 10",
    "agentweave_svid_rotation_errors_total": "> 0",
    "rate(agentweave_opa_errors_total[5m])": "> 5",
    "rate(agentweave_request_duration_seconds_bucket[5m])": "> 1",
}


@pytest.mark.parametrize("reads", FAQ)
def test_those_of_the_reference_documents_are_among_them(reads: str) -> None:
    found = [rule["expr"] for rule in RULES if reads in rule["expr"]]
    assert [expr for expr in found if expr.endswith(FAQ[reads])]


@needs_promtool
def test_prometheus_takes_rules_and_configuration() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", FOLDER / "alert-rules.yaml")
    assert "1 rule files found" in promtool("check", "config", FOLDER / "prometheus.yaml")


@needs_promtool
def test_they_fire_when_they_should_and_not_before(tmp_path: Path) -> None:
    """Prometheus itself evaluates them over series that a bus in trouble, and one that is well, would show."""
    assert [case.alert for case in CASES] == [rule["alert"] for rule in RULES]
    sides = [
        (f"{case.alert}-{kind}", case, values, fires)
        for case in CASES
        for kind, values, fires in (("trouble", case.trouble, 1), ("well", case.well, 0))
    ]
    series = [
        {"series": name.replace("AGENT", agent), "values": shown}
        for agent, _, values, _ in sides
        for name, shown in values.items()
    ]
    expected = [
        {
            "expr": f'min(ALERTS{{alertname="{case.alert}", alertstate="firing", agent="{agent}"}}) or vector(0)',
            "eval_time": case.at,
            "exp_samples": [{"labels": "{}", "value": fires}],
        }
        for agent, case, _, fires in sides
    ]
    file = tmp_path / "cases.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "rule_files": [str(FOLDER / "alert-rules.yaml")],
                "evaluation_interval": "1m",
                "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": expected}],
            }
        )
    )
    assert "SUCCESS" in promtool("test", "rules", file)
