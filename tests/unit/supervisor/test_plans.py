"""What a supervisor runs, by the stack's file and those of its agents."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentweave_bus.config import load_stack
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.supervisor.autoscaling import ScaleRule
from agentweave_bus.supervisor.plans import plan_of, planned_agents, plans_of
from agentweave_bus.supervisor.rules import HealthRule, RecycleRule, RestartRule

PORT = "AGENTWEAVE_OBSERVABILITY__METRICS__PORT"
DRAIN = "AGENTWEAVE_BUS__DRAIN_TIMEOUT"
AT_ONCE = "AGENTWEAVE_BUS__TASK_CONCURRENCY"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, more in (
        ("one", "observability: {metrics: {port: 9191}}"),
        ("two", "bus: {drain_timeout: 7.0}"),
    ):
        text = f"agent: {{name: {name}, trust_domain: a.test, class: 'm:C'}}\n{more}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def planned(folder: Path, *entries: str):
    (folder / "stack.yaml").write_text(
        "agents:\n" + "".join(f"  - {{config: {entry}}}\n" for entry in entries)
    )
    return planned_agents(load_stack(folder / "stack.yaml"))


def test_what_an_entry_says_becomes_the_plan(folder: Path) -> None:
    agents = planned(
        folder,
        "one.yaml, replicas: 2, concurrency: 3, env: {A: entry, B: entry}, uid: 7, gid: 8, drain_timeout: 5.0, ready_timeout: 9.0,"
        " restart: {policy: never, first: 1.0, longest: 2.0, limit: 3, within: 4.0},"
        " health: {beat: 1.0, silent: 6.0, deaf: 70.0}, recycle: {tasks: 10, memory_mb: 11, after: 12.0}",
    )
    plan = plan_of(agents[0], agents, {"A": "stack", "C": "stack"})
    assert plan.spec.environment == {
        "A": "entry",
        "B": "entry",
        "C": "stack",
        DRAIN: "5.0",
        PORT: "0",
        AT_ONCE: "3",
    }
    assert (plan.spec.user, plan.spec.group, plan.drain_s, plan.ready_s) == (7, 8, 5.0, 9.0)
    assert plan.restart == RestartRule("never", 1.0, 2.0, 3, 4.0)
    assert (plan.health, plan.recycle) == (HealthRule(1.0, 6.0, 70.0), RecycleRule(10, 11, 12.0))
    assert plan.places == agents[0].replicas == ("one/1", "one/2")


def test_a_single_worker_keeps_the_port_of_its_file_and_the_drain_of_its_own(folder: Path) -> None:
    one, two = plans_of(planned(folder, "one.yaml", "two.yaml"), "development")
    assert dict(one.spec.environment) == {"AGENTWEAVE_ENV": "development"}
    assert dict(two.spec.environment) == {"AGENTWEAVE_ENV": "development", PORT: "0"}
    assert (one.drain_s, two.drain_s, one.places) == (30.0, 7.0, ("one",))


def test_one_whose_number_follows_the_load_begins_with_the_least(folder: Path) -> None:
    agents = planned(folder, "one.yaml, min: 1, max: 4, scale: {backlog: 7, cool_down: 9.0}")
    plan = plan_of(agents[0], agents, {})
    assert plan.scale == ScaleRule(least=1, most=4, backlog=7, cool_down_s=9.0)
    assert plan.places == agents[0].replicas == ("one/1",)
    assert plan.spec.environment == {PORT: "0"}  # the next one could not have the same


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("one.yaml, uid: 7", "uid needs gid"),
        ("one.yaml, health: {beat: 2.0, silent: 5.0}", "less than three beats"),
    ],
)
def test_what_can_not_be_meant(folder: Path, entry: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        planned(folder, entry)
