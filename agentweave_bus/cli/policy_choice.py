"""Which policy the commands talk about: ``--policy``, else what this directory's stack or client uses."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from agentweave_bus.authz import DEFAULT_POLICY_PATH, Grants
from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.cli.client_config import named_or_written
from agentweave_bus.config import StackConfig, load_config, load_stack
from agentweave_bus.config.stack import DEFAULT_STACK_FILE
from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError
from agentweave_bus.supervisor.plans import planned_agents

__all__ = ["PolicyChoice", "add_policy_arguments", "choose_policy"]


@dataclass(frozen=True, slots=True)
class PolicyChoice:
    """A grants file or policy directory (None: nothing is granted), a package in it, and who chose it."""

    source: Path | None
    package: str
    chosen_by: str

    @property
    def grants(self) -> Grants:
        """The grants of the source; none where it has none. Raises ConfigurationError."""
        file = grants_file(self.source)
        return Grants() if file is None else Grants.load(file)


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--policy`` and ``--policy-path``."""
    parser.add_argument(
        "--policy",
        metavar="PATH",
        help="a grants file or policy directory; by default that of agentweave.yaml or of the running stack",
    )
    parser.add_argument(
        "--policy-path",
        metavar="PACKAGE",
        help="the package to ask; by default that of the agent that would ask it, else agentweave/grants",
    )


def choose_policy(options: argparse.Namespace, decides: str | None = None) -> PolicyChoice:
    """Return the policy that the options choose; ``decides`` is the SPIFFE ID of the agent that would ask.

    Raises:
        ConfigurationError: none is named and none is found, or what is named does not exist.

    """
    if options.policy is not None:
        source = Path(options.policy)
        if not source.exists():
            raise ConfigurationError(
                f"{source} does not exist.", key="--policy", hint="Name a grants file or a directory."
            )
        return PolicyChoice(source, options.policy_path or DEFAULT_POLICY_PATH, "--policy")
    if Path(DEFAULT_STACK_FILE).exists():
        stack = load_stack()
        package = options.policy_path or _package_of(stack, decides)
        return PolicyChoice(stack.policy_source, package, DEFAULT_STACK_FILE)
    return _of_client(options.policy_path)


def _package_of(stack: StackConfig, decides: str | None) -> str:
    """Return the package of the deciding agent, where the stack's agents can be loaded."""
    try:
        agents = planned_agents(stack)
    except AgentWeaveError:
        return DEFAULT_POLICY_PATH
    known = {str(agent.spiffe_id): agent.config.authorization.policy_package for agent in agents}
    return known.get(decides or "", DEFAULT_POLICY_PATH)


def _of_client(package: str | None) -> PolicyChoice:
    path, _ = named_or_written()
    if not path.exists():
        raise ConfigurationError(
            f"It is not said which policy: no --policy, no {DEFAULT_STACK_FILE} and no stack running here.",
            key="--policy",
            hint="Name a grants file or a policy directory with --policy.",
        )
    settings = load_config(path).authorization
    return PolicyChoice(settings.bundle, package or settings.policy_package, str(path))
