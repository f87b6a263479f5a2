"""A stack says which settings of an agent's file it replaces, and only these."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentweave_bus.config import StackConfig
from agentweave_bus.embedded.assembly import overrides, plan_agents

FREE = ""
NAMED = "observability: {metrics: {port: 9101}}"
OTHER = "observability: {metrics: {port: 9102}}"
ANY = "observability: {metrics: {port: 0}}"
OFF = "observability: {metrics: {port: 9101, enabled: false}}"


@pytest.mark.parametrize(
    ("files", "replaced"),
    [
        ([(NAMED, 1), (OTHER, 1)], set()),
        ([(NAMED, 2)], {("agent-0", "9101")}),
        ([(NAMED, 1), (NAMED, 1), (OTHER, 1)], {("agent-0", "9101"), ("agent-1", "9101")}),
        ([(FREE, 2), (ANY, 2), (OFF, 2)], set()),
    ],
)
def test_a_port_for_metrics_that_several_processes_want(
    tmp_path: Path, files: list[tuple[str, int]], replaced: set[tuple[str, str]]
) -> None:
    entries = []
    for number, (text, replicas) in enumerate(files):
        path = tmp_path / f"{number}.yaml"
        path.write_text(f"agent: {{name: agent-{number}, trust_domain: a.io, class: 'shop:A'}}\n{text}\n")
        entries.append({"config": path, "replicas": replicas})
    agents = plan_agents(StackConfig.model_validate({"trust_domain": "a.io", "agents": entries}))
    found = {(one.agent, one.was) for one in overrides(agents)}
    assert found == replaced
    assert {one.key for one in overrides(agents)} <= {"observability.metrics.port"}
