"""Whom the doctor looks at: a configuration, or a stack with all that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agentweave_bus.cli.client_config import is_held, named_or_written
from agentweave_bus.cli.config import is_stack
from agentweave_bus.config import AgentConfig, StackConfig, load_config, load_stack
from agentweave_bus.config.stack import DEFAULT_STACK_FILE
from agentweave_bus.embedded.assembly import PlannedAgent, client_file, plan_agents
from agentweave_bus.exceptions import ConfigurationError

__all__ = ["Patient", "examine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """What was found at a file.

    Attributes:
        name: the file.
        stack: the stack that it describes; None if it is an agent's or client's.
        agents: the stack's agents.
        configs: the configuration itself, or those of the stack's agents.
        caller: who can connect: the configuration itself, or a client of the running stack.
        running: whether the stack runs.
        left_behind: whether it was killed and left its clients' files.
        environment: ``production`` or ``development``, where it was said.

    """

    name: str
    stack: StackConfig | None = None
    agents: tuple[PlannedAgent, ...] = ()
    configs: tuple[AgentConfig, ...] = ()
    caller: AgentConfig | None = None
    running: bool = False
    left_behind: bool = False
    environment: str | None = None

    @property
    def live(self) -> tuple[AgentConfig, ...]:
        """Whose identity can be asked for here and now."""
        return () if self.caller is None else (self.caller,)


def examine(file: str | None, environment: str | None, client: str | None) -> Patient:
    """Read the file that is named, or the one that commands here would take.

    Raises:
        ConfigurationError: there is none, or it is wrong.

    """
    path = _chosen(file)
    if not is_stack(path):
        config = load_config(path, environment=environment)
        return Patient(name=str(path), configs=(config,), caller=config, environment=environment)
    stack = load_stack(path)
    agents = plan_agents(stack, environment)
    lock = stack.state_dir.absolute() / "lock"
    running = lock.exists() and is_held(lock)
    name = client or (stack.clients[0] if stack.clients else "")
    written = client_file(stack.state_dir.absolute(), name)
    if client is not None and client not in stack.clients:
        raise ConfigurationError(
            f"The stack has no client {client!r}.", key="--as", hint=f"It has {', '.join(stack.clients)}."
        )
    return Patient(
        name=str(path),
        stack=stack,
        agents=agents,
        configs=tuple(agent.config for agent in agents),
        caller=load_config(written) if running and written.is_file() else None,
        running=running,
        left_behind=not running and written.is_file(),
        environment=environment,
    )


def _chosen(file: str | None) -> Path:
    if file is not None:
        return Path(file)
    if Path(DEFAULT_STACK_FILE).exists():
        return Path(DEFAULT_STACK_FILE)
    path, named = named_or_written()
    if not named and not path.is_file():
        raise ConfigurationError(
            f"There is nothing to look at: no FILE, no {DEFAULT_STACK_FILE}, no AGENTWEAVE_CONFIG and no"
            f" {path}.",
            key="FILE",
            hint="Name a configuration, or begin with agentweave new hello.",
        )
    return path
