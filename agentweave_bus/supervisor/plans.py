"""From a stack's file to what a supervisor runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from agentweave_bus.config import AgentConfig, StackAgent, StackConfig, load_config
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.supervisor.autoscaling import ScaleRule
from agentweave_bus.supervisor.rules import HealthRule, RecycleRule, RestartRule
from agentweave_bus.supervisor.worker_plan import METRICS_PORT, WorkerPlan, place_names
from agentweave_bus.supervisor.worker_process import WorkerSpec

__all__ = ["PlannedAgent", "has_its_port", "plan_of", "planned_agents", "plans_of"]

_DRAIN: Final = "AGENTWEAVE_BUS__DRAIN_TIMEOUT"
_CONCURRENCY: Final = "AGENTWEAVE_BUS__TASK_CONCURRENCY"


@dataclass(frozen=True, slots=True)
class PlannedAgent:
    """One agent of a stack: its entry in the stack's file, its own configuration, its identity."""

    entry: StackAgent
    config: AgentConfig

    @property
    def spiffe_id(self) -> SpiffeID:
        """The identity that its workers get."""
        return self.config.agent.spiffe_id

    @property
    def replicas(self) -> tuple[str, ...]:
        """A name for each of the processes that it has at first."""
        return place_names(self.config.agent.name, *self.entry.workers)

    @property
    def scales(self) -> bool:
        """Whether their number follows the load."""
        return self.entry.min is not None


def planned_agents(config: StackConfig, environment: str | None = None) -> tuple[PlannedAgent, ...]:
    """Load every agent's configuration and check that they can be run beside each other.

    Raises:
        ConfigurationError: a file is wrong, an agent says nowhere which class to run, or has the name of
            another.

    """
    agents = tuple(
        PlannedAgent(one, load_config(one.config, environment=environment)) for one in config.agents
    )
    for agent in agents:
        if agent.entry.class_ is None and agent.config.agent.class_ is None:
            raise ConfigurationError(
                f"{agent.entry.config}: it is not said which class to run.",
                key="agent.class",
                hint="Set agent.class to module:Class there, or class beside it in the stack's file.",
            )
    names = Counter(agent.config.agent.name for agent in agents)
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise ConfigurationError(
            f"Several agents are called {', '.join(twice)}.",
            key="agents",
            hint="Give each a name of its own, or use replicas to run more of one.",
        )
    return agents


def has_its_port(agent: PlannedAgent, agents: tuple[PlannedAgent, ...]) -> bool:
    """Say whether an agent's metrics are on the port that its file names: nobody else here may want it."""
    metrics = agent.config.observability.metrics
    wanted = sum(
        one.entry.workers[1] for one in agents if one.config.observability.metrics.port == metrics.port
    )
    return "port" in metrics.model_fields_set and wanted == 1


def plan_of(
    agent: PlannedAgent, agents: tuple[PlannedAgent, ...], variables: Mapping[str, str]
) -> WorkerPlan:
    """Return the plan for one of ``agents``.

    ``variables`` are given to its workers; what its entry says in ``env`` comes before them.
    """
    entry, config = agent.entry, agent.config
    least, most = entry.workers
    restart, health, recycle = entry.restart, entry.health, entry.recycle
    if (drain_s := entry.drain_timeout) is None:
        drain_s = config.bus.drain_timeout
    drains = {} if entry.drain_timeout is None else {_DRAIN: str(float(entry.drain_timeout))}
    at_once = {} if entry.concurrency is None else {_CONCURRENCY: str(entry.concurrency)}
    ports = {} if has_its_port(agent, agents) else {METRICS_PORT: "0"}
    return WorkerPlan(
        spec=WorkerSpec(
            name=config.agent.name,
            config=entry.config,
            class_path=entry.class_,
            environment={**variables, **ports, **drains, **at_once, **entry.env},
            user=entry.uid,
            group=entry.gid,
        ),
        replicas=least,
        scale=ScaleRule(least, most, entry.scale.backlog, entry.scale.cool_down) if agent.scales else None,
        restart=RestartRule(restart.policy, restart.first, restart.longest, restart.limit, restart.within),
        health=HealthRule(health.beat, health.silent, health.deaf),
        recycle=RecycleRule(recycle.tasks, recycle.memory_mb, recycle.after),
        drain_s=drain_s,
        ready_s=entry.ready_timeout,
    )


def plans_of(agents: tuple[PlannedAgent, ...], environment: str | None = None) -> list[WorkerPlan]:
    """Return the plans for agents that run against existing infrastructure, as their own files say."""
    chosen = {} if environment is None else {"AGENTWEAVE_ENV": environment}
    return [plan_of(agent, agents, chosen) for agent in agents]
