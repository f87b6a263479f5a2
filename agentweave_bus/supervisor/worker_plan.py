"""What is to run: the plan for the workers of one agent, and what their places are called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from agentweave_bus.supervisor.autoscaling import ScaleRule
from agentweave_bus.supervisor.rules import HealthRule, RecycleRule, RestartRule
from agentweave_bus.supervisor.worker_process import READY_SECONDS, WorkerSpec

__all__ = ["METRICS_PORT", "WorkerPlan", "place_names"]

METRICS_PORT: Final = "AGENTWEAVE_OBSERVABILITY__METRICS__PORT"
"""Environment variable: the port of a worker's own listener."""


def place_names(agent: str, replicas: int, most: int) -> tuple[str, ...]:
    """Return a name for each place of an agent's workers, of which there may be ``most``."""
    return (agent,) if most == 1 else tuple(f"{agent}/{number}" for number in range(1, replicas + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """What is to run: ``replicas`` processes of ``spec``, whose name is the agent's.

    With ``scale`` that is how many there are at first. A worker that is told to end has ``drain_s`` seconds
    for what it is doing, and ``ready_s`` seconds to become ready.
    """

    spec: WorkerSpec
    replicas: int = 1
    scale: ScaleRule | None = None
    restart: RestartRule = field(default_factory=RestartRule)
    health: HealthRule = field(default_factory=HealthRule)
    recycle: RecycleRule = field(default_factory=RecycleRule)
    drain_s: float = 30.0
    ready_s: float = READY_SECONDS

    @property
    def name(self) -> str:
        """The agent's name."""
        return self.spec.name

    @property
    def places(self) -> tuple[str, ...]:
        """The names of its places at first."""
        most = self.replicas if self.scale is None else self.scale.most
        return place_names(self.name, self.replicas, most)
