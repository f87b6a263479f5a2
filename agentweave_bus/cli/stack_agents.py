"""Which agents the stack of this directory has, to say so of a name that none of them bears."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from agentweave_bus.config import load_stack
from agentweave_bus.config.stack import DEFAULT_STACK_FILE
from agentweave_bus.embedded.assembly import plan_agents
from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["unknown_agent"]


def unknown_agent(target: str) -> str | None:
    """Say that this directory's stack has no such agent; None if it has, or nothing is known of it.

    Agents of other trust domains are nobody's here, so nothing is said of them.
    """
    if not Path(DEFAULT_STACK_FILE).exists():
        return None
    try:
        stack = load_stack()
        known = [agent.spiffe_id for agent in plan_agents(stack)]
        wanted = SpiffeID(target)
    except AgentWeaveError:
        return None
    if wanted in known or wanted.trust_domain != stack.trust_domain or not wanted.path.startswith("/agent/"):
        return None
    names = {identity.path.removeprefix("/agent/"): identity for identity in known}
    name = wanted.path.removeprefix("/agent/")
    close = get_close_matches(name, names, n=1)
    there = f"did you mean {close[0]}?" if close else f"it has: {', '.join(sorted(names)) or 'none'}."
    return f"The stack of {DEFAULT_STACK_FILE} has no agent {name}; {there}"
