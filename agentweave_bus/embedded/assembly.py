"""A whole stack with its workers, from one file: what ``agentweave up`` runs.

The embedded stack, a worker process for every replica of every agent, and for each client a configuration
file with which it can call. Where an agent's own file names other places (a SPIRE socket, an OPA server, a
broker), variables that beat the file point it at this stack; :attr:`LocalStack.overridden` says which.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from agentweave_bus.config import StackConfig
from agentweave_bus.embedded.stack import EmbeddedStack, StackSettings, embedded_stack
from agentweave_bus.embedded.state_directory import CLIENT_HEAD, StateLock, keep_out_of_git, locked
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.runtime.surroundings import REAL, Surroundings
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.supervisor.plans import PlannedAgent, has_its_port, plan_of, planned_agents
from agentweave_bus.supervisor.supervisor import Supervisor, supervised
from agentweave_bus.supervisor.worker_plan import METRICS_PORT, WorkerPlan

__all__ = [
    "LocalStack",
    "Override",
    "PlannedAgent",
    "RunningStack",
    "client_file",
    "client_files",
    "local_stack",
    "locked_stack",
    "noted_workers",
    "overrides",
    "plan_agents",
    "worker_plans",
]

_log = logging.getLogger(__name__)

_ENDPOINT: Final = "AGENTWEAVE_IDENTITY__SPIFFE_ENDPOINT"


@dataclass(frozen=True, slots=True)
class Override:
    """A setting of an agent's file that the stack replaces: ``variable`` does it, ``was`` is what it says."""

    agent: str
    key: str
    was: str
    variable: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningStack:
    """A running stack, whoever serves its agents."""

    config: StackConfig
    agents: tuple[PlannedAgent, ...]
    stack: EmbeddedStack
    clients: Mapping[SpiffeID, Path]
    """The configuration file of each client."""
    overridden: tuple[Override, ...]
    seconds: float
    """How long it took to come up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalStack(RunningStack):
    """A running stack with its workers."""

    workers: Supervisor


def plan_agents(config: StackConfig, environment: str | None = None) -> tuple[PlannedAgent, ...]:
    """Load every agent's configuration and check that they fit together, and to the stack.

    Raises:
        ConfigurationError: as :func:`~agentweave_bus.supervisor.plans.planned_agents`; or an agent is of
            another trust domain than the stack.

    """
    agents = planned_agents(config, environment)
    for agent in agents:
        _check_domain(config, agent)
    return agents


@asynccontextmanager
async def local_stack(
    config: StackConfig,
    on_line: Callable[[str, str], None],
    *,
    environment: str | None = None,
    unrestricted: tuple[SpiffeID, ...] = (),
    text_logs: bool = False,
    on_event: Callable[[str], None] = _log.info,
    on_workers: Callable[[Supervisor], None] = lambda _: None,
) -> AsyncIterator[LocalStack]:
    """Start everything that ``config`` names; take it all down at the end of the block.

    ``on_line(worker, line)`` gets what the workers write, ``on_event(text)`` what happens to them, and
    ``on_workers`` their supervisor before any of them is started.
    ``environment`` is ``production`` or ``development``, for the agents; without it ``AGENTWEAVE_ENV``
    decides, as everywhere.
    ``unrestricted`` is as in :class:`~agentweave_bus.embedded.stack.StackSettings`. With ``text_logs`` agents
    whose file does not choose a format log for people.

    Raises:
        ConfigurationError: the file, an agent's file or the grants are wrong, or the state directory is in
            use by another stack.
        BusError: the broker does not come up.
        WorkerError: a worker is not ready in time.

    """
    began = time.monotonic()
    agents = plan_agents(config, environment)
    async with (
        locked_stack(config, agents, unrestricted=unrestricted) as (stack, lock),
        supervised(on_line=on_line, on_event=on_event, on_change=lock.note_workers, strict=True) as workers,
    ):
        on_workers(workers)
        with client_files(config, stack) as files:
            await workers.start(worker_plans(config, agents, stack, environment, text_logs=text_logs))
            await stack.settled()
            lock.workers = lambda: {one.spec.name: one.pid for one in workers.all if one.started}
            lock.note_workers()
            yield LocalStack(
                config=config,
                agents=agents,
                stack=stack,
                workers=workers,
                clients=files,
                overridden=overrides(agents),
                seconds=time.monotonic() - began,
            )


@asynccontextmanager
async def locked_stack(
    config: StackConfig,
    agents: tuple[PlannedAgent, ...],
    *,
    unrestricted: tuple[SpiffeID, ...] = (),
    surroundings: Surroundings = REAL,
    patient: bool = False,
) -> AsyncIterator[tuple[EmbeddedStack, StateLock]]:
    """Start the embedded stack for ``agents`` and the clients of ``config``, alone in its state directory.

    Calls can be claimed once it has settled. ``surroundings`` and ``patient`` are as of
    :func:`~agentweave_bus.embedded.stack.embedded_stack` and its settings. Raises as :func:`local_stack`.
    """
    settings = StackSettings(
        trust_domain=config.trust_domain,
        state_dir=config.state_dir.absolute(),
        identities=(*(agent.spiffe_id for agent in agents), *_clients(config)),
        grants=config.policy_source,
        port=config.bus.port,
        unrestricted=unrestricted,
        revocations=config.revocations_file,
        sync=config.bus.sync if isinstance(config.bus.sync, str) else f"{round(config.bus.sync * 1000)}ms",
        patient=patient,
    )
    with locked(settings.state_dir) as lock:
        keep_out_of_git(settings.state_dir)
        async with embedded_stack(settings, settle=False, surroundings=surroundings) as stack:
            lock.note_sockets(stack.api.directory)
            yield stack, lock


def client_file(state_dir: Path, name: str) -> Path:
    """Return where the configuration of the client ``name`` lies while a stack runs."""
    return state_dir / "clients" / f"{name}.yaml"


def noted_workers(state_dir: Path) -> dict[str, int]:
    """Return the process of each worker that the stack in ``state_dir`` has started, dead or alive.

    Empty until all of them are ready, and where no stack runs.
    """
    try:
        lines = (state_dir / "lock").read_text().splitlines()[2:]
    except OSError:
        return {}
    pairs = [line.rpartition(" ") for line in lines]
    return {name: int(pid) for name, _, pid in pairs if name and pid.isdecimal()}


def _check_domain(config: StackConfig, agent: PlannedAgent) -> None:
    domain = agent.config.agent.trust_domain
    if domain != config.trust_domain:
        raise ConfigurationError(
            f"{agent.entry.config}: agent.trust_domain is {domain}, the stack's is {config.trust_domain}.",
            key="trust_domain",
            hint="Its authority issues for one trust domain only: make the two equal.",
        )


# --- what each worker is given ---------------------------------------------------------------------------


def worker_plans(
    config: StackConfig,
    agents: tuple[PlannedAgent, ...],
    stack: EmbeddedStack,
    environment: str | None,
    *,
    text_logs: bool = False,
) -> list[WorkerPlan]:
    """Return what the workers of each agent are given; ``text_logs`` is as of :func:`local_stack`."""
    return list(_plans(config, agents, stack, environment, text_logs))


def _plans(
    config: StackConfig,
    agents: tuple[PlannedAgent, ...],
    stack: EmbeddedStack,
    environment: str | None,
    text_logs: bool,
) -> Iterator[WorkerPlan]:
    for agent in agents:
        variables = {**stack.environment(agent.spiffe_id), **_variables(config, agent)}
        if environment is not None:
            variables["AGENTWEAVE_ENV"] = environment
        if text_logs and "format" not in agent.config.observability.logging.model_fields_set:
            variables["AGENTWEAVE_OBSERVABILITY__LOGGING__FORMAT"] = "text"
        yield plan_of(agent, agents, variables)


def _variables(config: StackConfig, agent: PlannedAgent) -> dict[str, str]:
    """Return what the stack decides for an agent beside its identity and broker."""
    settings = agent.config
    variables: dict[str, str] = {}
    if settings.identity.provider != "spiffe":
        variables |= {"AGENTWEAVE_IDENTITY__PROVIDER": "spiffe", "AGENTWEAVE_IDENTITY__STATIC": "null"}
    if settings.authorization.provider != "embedded":
        variables["AGENTWEAVE_AUTHORIZATION__PROVIDER"] = "embedded"
    source = config.policy_source
    if settings.authorization.bundle is None and source is not None:
        variables["AGENTWEAVE_AUTHORIZATION__BUNDLE"] = _yaml(str(source))
    if settings.identity.revocations is None and (file := config.revocations_file) is not None:
        variables["AGENTWEAVE_IDENTITY__REVOCATIONS"] = _yaml(str(file))
    if settings.authorization.audit.destination == f".agentweave/audit/{settings.agent.name}.jsonl":
        audit = config.state_dir.absolute() / "audit" / f"{settings.agent.name}.jsonl"
        variables["AGENTWEAVE_AUTHORIZATION__AUDIT__DESTINATION"] = _yaml(str(audit))
    if "authority_history" not in settings.identity.model_fields_set:
        variables["AGENTWEAVE_IDENTITY__AUTHORITY_HISTORY"] = _yaml(str(_authorities(config)))
    return variables


def _authorities(config: StackConfig) -> Path:
    return config.state_dir.absolute() / "authorities"


def overrides(agents: tuple[PlannedAgent, ...]) -> tuple[Override, ...]:
    """Return which settings that the agents' files really make a stack of these agents replaces."""
    return tuple(one for agent in agents for one in _overrides_of(agent, agents))


def _overrides_of(agent: PlannedAgent, agents: tuple[PlannedAgent, ...]) -> Iterator[Override]:
    settings, name = agent.config, agent.config.agent.name
    identity, authorization, bus = settings.identity, settings.authorization, settings.bus
    if "spiffe_endpoint" in identity.model_fields_set:
        yield Override(name, "identity.spiffe_endpoint", identity.spiffe_endpoint, _ENDPOINT)
    if identity.provider != "spiffe":
        yield Override(name, "identity.provider", identity.provider, "AGENTWEAVE_IDENTITY__PROVIDER")
    if authorization.provider != "embedded":
        was = f"{authorization.provider} at {', '.join(authorization.endpoints)}"
        yield Override(name, "authorization.provider", was, "AGENTWEAVE_AUTHORIZATION__PROVIDER")
    if "servers" in bus.model_fields_set:
        yield Override(name, "bus.servers", ", ".join(bus.servers), "AGENTWEAVE_BUS__SERVERS")
    metrics = settings.observability.metrics
    named = "port" in metrics.model_fields_set and metrics.port != 0
    if metrics.enabled and named and not has_its_port(agent, agents):
        yield Override(name, "observability.metrics.port", str(metrics.port), METRICS_PORT)


# --- what clients are given ------------------------------------------------------------------------------


def _clients(config: StackConfig) -> dict[SpiffeID, str]:
    return {SpiffeID.of(config.trust_domain, "client", name): name for name in config.clients}


@contextmanager
def client_files(config: StackConfig, stack: EmbeddedStack) -> Iterator[dict[SpiffeID, Path]]:
    """Write each client's configuration; remove them at the end, when nobody would answer any more."""
    written: dict[SpiffeID, Path] = {}
    try:
        for identity, name in _clients(config).items():
            path = client_file(config.state_dir.absolute(), name)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_text(_client_yaml(config, stack, identity, name))
            written[identity] = path
        yield written
    finally:
        for path in written.values():
            path.unlink(missing_ok=True)


def _client_yaml(config: StackConfig, stack: EmbeddedStack, identity_id: SpiffeID, name: str) -> str:
    audit = config.state_dir.absolute() / "audit" / f"client-{name}.jsonl"
    authorization: dict[str, Any] = {"audit": {"destination": str(audit)}}
    if (source := config.policy_source) is not None:
        authorization["bundle"] = str(source)
    identity = {
        "spiffe_endpoint": stack.api.endpoint(identity_id),
        "authority_history": str(_authorities(config)),
    }
    if (file := config.revocations_file) is not None:
        identity["revocations"] = str(file)
    document = {
        "agent": {"name": name, "trust_domain": config.trust_domain, "path": f"client/{name}"},
        "identity": identity,
        "authorization": authorization,
        "bus": {"servers": [stack.bus_url], "server_spiffe_id": str(stack.broker_id)},
        "observability": {
            "logging": {"level": "WARNING", "format": "text"},
            "metrics": {"enabled": False},
        },
    }
    head = f"{CLIENT_HEAD} (process {os.getpid()}); it is removed when that ends.\n"
    return head + yaml.safe_dump(document, sort_keys=False)


def _yaml(value: str) -> str:
    """Write a text so that a variable's YAML reads as just that text."""
    return yaml.safe_dump(value, default_style='"', width=10_000).strip()
