"""Who the stack of this directory has, and what they offer: to say so of a name that nobody bears."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from agentweave_bus.cli.stack_check import capabilities_of
from agentweave_bus.config import StackConfig, load_stack
from agentweave_bus.config.stack import DEFAULT_STACK_FILE
from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.supervisor.plans import PlannedAgent, planned_agents

__all__ = ["unknown_agent", "unknown_capability", "unknown_identity"]

_ROLES: Final = ("agent", "client")


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
