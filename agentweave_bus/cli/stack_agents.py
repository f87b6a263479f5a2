"""Who the stack of this directory has, and what they offer: to say so of a name that nobody bears."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from agentweave_bus.authz import Grants
from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.cli.stack_check import capabilities_of
from agentweave_bus.config import AgentConfig, StackConfig, load_stack
from agentweave_bus.config.stack import DEFAULT_STACK_FILE
from agentweave_bus.exceptions import AgentCallError, AgentWeaveError, AuthorizationError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.supervisor.plans import PlannedAgent, planned_agents

__all__ = ["misspelt", "unknown_agent", "unknown_capability", "unknown_identity"]

_ROLES: Final = ("agent", "client")


def misspelt(
    error: AgentCallError, config: AgentConfig, target: str, capability: str, kind: str
) -> str | None:
    """Say which name was meant where what ended with ``error`` names nobody, or nothing that is granted."""
    if (unknown := unknown_agent(target)) is not None:
        return unknown
    if not isinstance(error, AuthorizationError) or error.direction != "outbound":
        return None
    return _ungranted(config, target, capability, kind)


def _ungranted(config: AgentConfig, target: str, name: str, kind: str) -> str | None:
    """Name what the caller's own grants let it ask ``target`` for, if that is nearly ``name``.

    The agent's class is not looked at, as `agentweave why` does: a call that fails must not run code that
    happens to lie in this directory, nor wait for it.
    """
    try:
        file = grants_file(config.authorization.bundle)
        if file is None:
            return None
        reaches = Grants.load(file).callees_of(config.agent.spiffe_id)
    except AgentWeaveError:
        return None
    known = {
        one
        for reach in reaches
        if reach.agent == target and kind in reach.kinds
        for one in reach.capabilities
    }
    close = get_close_matches(name, sorted(known), n=1)
    if not close or known & {name, "*"}:
        return None
    return f"No grant of {file} is about {name} there; did you mean {close[0]}?"


def unknown_agent(target: str) -> str | None:
    """Say that this directory's stack has no such agent; None if it has, or nothing is known of it.

    Agents of other trust domains are nobody's here, so nothing is said of them.
    """
    if "/agent/" not in target:
        return None
    return unknown_identity(target)


def unknown_identity(who: str) -> str | None:
    """Say that this directory's stack has no such agent or client; None if it has, or nothing is known."""
    if (found := _stack()) is None:
        return None
    stack, agents = found
    try:
        wanted = SpiffeID(who)
    except AgentWeaveError:
        return None
    clients = [SpiffeID.of(stack.trust_domain, "client", name) for name in stack.clients]
    everyone = [*(agent.spiffe_id for agent in agents), *clients]
    role, _, name = wanted.path.removeprefix("/").partition("/")
    if wanted in everyone or wanted.trust_domain != stack.trust_domain or role not in _ROLES:
        return None
    known = {one.path.removeprefix(f"/{role}/") for one in everyone if one.path.startswith(f"/{role}/")}
    if not known:
        return None  # they are served elsewhere, with this broker
    return f"The stack of {DEFAULT_STACK_FILE} has no {role} {name}; {_instead(name, known)}"


def unknown_capability(callee: str, name: str) -> str | None:
    """Say that an agent of this directory's stack has no such capability; None if it has, or who knows.

    The agent's class is imported for that, in a process of its own.
    """
    _, agents = _stack() or (None, ())
    agent = next((one for one in agents if str(one.spiffe_id) == callee), None)
    if agent is None or "." in name or ":" in name:  # events and operators' acts are no capabilities
        return None
    try:
        known = capabilities_of(agent, None)
    except AgentWeaveError:
        return None
    if name in known:
        return None
    return f"{callee} has no capability {name}; {_instead(name, known)}"


def _stack() -> tuple[StackConfig, Iterable[PlannedAgent]] | None:
    if not Path(DEFAULT_STACK_FILE).exists():
        return None
    try:
        stack = load_stack()
        return stack, planned_agents(stack)
    except AgentWeaveError:
        return None


def _instead(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else f"it has: {', '.join(names) or 'none'}."
