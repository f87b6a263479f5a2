"""The file of ``agentweave up``: which agents run, under which grants."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from agentweave_bus.config.document import KeyPath
from agentweave_bus.config.fields import (
    ConfigModel,
    FilePath,
    HandlerPath,
    Name,
    Port,
    Seconds,
    TrustDomain,
)
from agentweave_bus.config.loading import validated
from agentweave_bus.config.operation import ObservabilityConfig
from agentweave_bus.config.sources import Settings

__all__ = [
    "DEFAULT_STACK_FILE",
    "MOST_WORKERS",
    "RecycleConfig",
    "RestartConfig",
    "ScaleConfig",
    "StackAgent",
    "StackBus",
    "StackConfig",
    "WorkerHealthConfig",
    "load_stack",
]

DEFAULT_STACK_FILE: Final = "agentweave.yaml"

MOST_WORKERS: Final = 256
"""Of one agent, under one supervisor."""

_FILE_KEYS: Final[tuple[KeyPath, ...]] = (
    ("grants",),
    ("policies",),
    ("revocations",),
    ("agents", "*", "config"),
)


class RestartConfig(ConfigModel):
    """When a worker that ended by itself is started again; times are seconds."""

    policy: Literal["always", "on-failure", "never"] = "always"
    first: Seconds = 0.5
    longest: Seconds = 30.0
    limit: Annotated[int, Field(strict=True, ge=0, le=1000)] = 5
    within: Seconds = 60.0


class WorkerHealthConfig(ConfigModel):
    """When a worker that runs is not well; times are seconds."""

    beat: Annotated[float, Field(strict=True, ge=0.1, le=60)] = 2.0
    silent: Seconds = 20.0
    deaf: Annotated[float, Field(strict=True, ge=60, le=86_400)] = 120.0

    @model_validator(mode="after")
    def _more_than_a_beat(self) -> Self:
        if self.silent < 3 * self.beat:
            raise ValueError(
                f"silent ({self.silent:g} s) is less than three beats of {self.beat:g} s:"
                " a worker that is well would be killed for one that comes late"
            )
        return self


class RecycleConfig(ConfigModel):
    """When a worker that is well is replaced by a fresh one; ``after`` is in seconds."""

    tasks: Annotated[int, Field(strict=True, ge=1, le=2**40)] | None = None
    memory_mb: Annotated[int, Field(strict=True, ge=1, le=2**20)] | None = None
    after: Annotated[float, Field(strict=True, ge=1, le=31_536_000)] | None = None


class ScaleConfig(ConfigModel):
    """When an agent gets more or fewer workers between its ``min`` and ``max``; times are seconds.

    ``backlog`` is how many tasks may wait for each worker. One that is not needed goes after ``cool_down``.
    """

    backlog: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 20
    cool_down: Seconds = 60.0


class StackAgent(ConfigModel):
    """One agent: its configuration file, optionally its class, and the processes that run it.

    There are ``replicas`` of them, or from ``min`` to ``max`` by the tasks that wait.
    """

    config: FilePath
    class_: Annotated[HandlerPath | None, Field(alias="class")] = None
    replicas: Annotated[int, Field(strict=True, ge=1, le=MOST_WORKERS)] = 1
    min: Annotated[int, Field(strict=True, ge=1, le=MOST_WORKERS)] | None = None
    max: Annotated[int, Field(strict=True, ge=1, le=MOST_WORKERS)] | None = None
    scale: ScaleConfig = ScaleConfig()
    concurrency: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = None
    env: dict[str, str] = Field(default_factory=dict)
    uid: Annotated[int, Field(strict=True, ge=0, le=2**32 - 2)] | None = None
    gid: Annotated[int, Field(strict=True, ge=0, le=2**32 - 2)] | None = None
    restart: RestartConfig = RestartConfig()
    health: WorkerHealthConfig = WorkerHealthConfig()
    recycle: RecycleConfig = RecycleConfig()
    ready_timeout: Annotated[float, Field(strict=True, gt=0, le=3_600)] = 30.0
    drain_timeout: Annotated[float, Field(strict=True, gt=0, le=3_600)] | None = None

    @property
    def workers(self) -> tuple[int, int]:
        """How many processes run it: the least and the most."""
        if self.min is None or self.max is None:
            return self.replicas, self.replicas
        return self.min, self.max

    @model_validator(mode="after")
    def _fixed_or_scaled(self) -> Self:
        if (self.min is None) != (self.max is None):
            raise ValueError("min and max belong together: one of them is missing")
        if self.min is None or self.max is None:
            if "scale" in self.model_fields_set:
                raise ValueError("scale needs min and max: how many workers there may be")
            return self
        if "replicas" in self.model_fields_set:
            raise ValueError("give either replicas, a fixed number, or min and max, not both")
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is more than max ({self.max})")
        return self

    @model_validator(mode="after")
    def _user_with_group(self) -> Self:
        if self.uid is not None and self.gid is None:
            raise ValueError("uid needs gid: without it the workers would stay in the supervisor's own group")
        return self


class StackBus(ConfigModel):
    """The embedded broker; port 0 takes a free one.

    ``sync`` is how often what is stored is forced to the disk, in seconds, or ``always``: before each
    acknowledgement, so that not even a loss of power loses what was accepted.
    """

    port: Port = 0
    sync: Literal["always"] | Annotated[float, Field(strict=True, ge=0.1, le=120)] = 1.0


class StackConfig(ConfigModel):
    """A whole stack. ``grants`` and ``policies`` are alternatives; neither means that nobody may call."""

    trust_domain: TrustDomain = "agentweave.local"
    state_dir: FilePath = Path(".agentweave")
    agents: tuple[StackAgent, ...] = ()
    grants: FilePath | None = None
    policies: FilePath | None = None
    revocations: FilePath | None = None
    clients: tuple[Name, ...] = ("cli",)
    bus: StackBus = StackBus()
    observability: ObservabilityConfig = ObservabilityConfig()

    @property
    def policy_source(self) -> Path | None:
        """The grants file or the policy directory, as an absolute path, if there is one."""
        source = self.grants or self.policies
        return None if source is None else source.absolute()

    @property
    def revocations_file(self) -> Path | None:
        """The file of revocations, as an absolute path, if there is one."""
        return None if self.revocations is None else self.revocations.absolute()

    @field_validator("agents")
    @classmethod
    def _each_once(cls, value: tuple[StackAgent, ...]) -> tuple[StackAgent, ...]:
        files = [agent.config for agent in value]
        if twice := {str(file) for file in files if files.count(file) > 1}:
            raise ValueError(f"listed twice: {', '.join(sorted(twice))}; use replicas to run more of one")
        return value

    @model_validator(mode="after")
    def _one_policy_source(self) -> Self:
        if self.grants is not None and self.policies is not None:
            raise ValueError("give either grants (a file) or policies (a directory), not both")
        return self


def load_stack(path: str | Path | None = None) -> StackConfig:
    """Return the checked stack file.

    Without ``path`` it is ``agentweave.yaml`` of the working directory, or where there is none an
    empty stack: broker, identities and policy engine, no agents. Names of files are relative to the
    stack file, ``state_dir`` to the working directory. Variables ``AGENTWEAVE_STACK__<KEY>`` beat the
    file.

    Raises:
        ConfigurationError: with every problem found.

    """
    settings = Settings()
    if path is None and Path(DEFAULT_STACK_FILE).exists():
        path = DEFAULT_STACK_FILE
    if path is not None:
        settings.read_file(Path(path), _FILE_KEYS)
    settings.read_stack_variables(os.environ)
    return validated(StackConfig, settings, "production")
