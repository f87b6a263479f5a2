"""What a command says of a stack: what it lacks, how to call its agents, and that its broker is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentweave_bus.authz import Grants
from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.cli.client_config import STATE_DIR
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.cli.output import message, table
from agentweave_bus.config import StackConfig
from agentweave_bus.embedded.assembly import RunningStack
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.operator_acts import OBSERVE_ACT

__all__ = ["clients_of", "guidance", "how_to_look", "overridden_by", "until_broker_ends", "warnings_of"]


def warnings_of(config: StackConfig) -> tuple[str, ...]:
    """Return what a stack's file lacks for anybody to call anybody."""
    source = config.policy_source
    if source is None:
        return ("neither grants nor policies in the stack's file: nobody may call anybody.",)
    file = grants_file(source)
    if file is None:
        return (f"{source} has no grants.yaml: the broker lets nobody call anybody, whatever policies say.",)
    return tuple(f"{file}: {text}" for text in Grants.load(file).warnings())


def clients_of(stack: RunningStack) -> dict[str, str]:
    """Return the configuration file of each client, for JSON."""
    return {str(identity): str(path) for identity, path in stack.clients.items()}


def overridden_by(stack: RunningStack) -> list[dict[str, Any]]:
    """Return what the stack replaces in the agents' files, for JSON."""
    return [
        {"agent": one.agent, "key": one.key, "was": one.was, "by": one.variable} for one in stack.overridden
    ]


def guidance(stack: RunningStack) -> list[str]:
    """Return for people what the stack replaces, how to call one of its agents, and how to look at it."""
    return [*_overridden_text(stack), *_how_to_call(stack), *how_to_look(stack)]


async def until_broker_ends(stack: RunningStack) -> ExitCode:
    """Wait until the stack's broker has ended, and say so; return with what the command is to exit."""
    code = await stack.stack.nats.wait()
    message(f"agentweave: the broker ended (exit code {code}); nobody can be reached any more.")
    return ExitCode.UNREACHABLE


def _overridden_text(stack: RunningStack) -> list[str]:
    if not stack.overridden:
        return []
    rows = [(one.agent, one.key, one.was, f"by {one.variable}") for one in stack.overridden]
    return ["In place of what the agents' files say, this stack is used:", table(rows)]


def _how_to_call(stack: RunningStack) -> list[str]:
    """Return a command that works now, or the grant that is missing for one."""
    client = next(iter(stack.clients), None)
    if client is None or not stack.agents:
        return []
    target, capability = _reachable(stack, client)
    if target is None:
        agent = stack.agents[0].spiffe_id
        missing = Grants().explain(client, agent, "health").rstrip().replace("\n", "\n  ")
        return [f"No grant lets {client} call anything yet; such as this would:\n  {missing}"]
    config = "" if _is_default(stack, client) else f" \\\n      --config {stack.clients[client]}"
    command = f"agentweave call --target {target} --capability {capability}{config}"
    return [f"As {client}, in this directory:\n  {command}"]


def how_to_look(stack: RunningStack) -> list[str]:
    """Return the command that opens the console, as a client of the stack who may look."""
    file = grants_file(stack.config.policy_source)
    grants = Grants() if file is None else Grants.load(file)
    client = next((one for one in stack.clients if grants.operator_may(one, OBSERVE_ACT)), None)
    if client is None:
        return []
    path = stack.clients[client]
    state_dir = path.parent.parent
    here = state_dir == Path.cwd() / STATE_DIR
    who = f"--as {path.stem}" if here else f"--config {path} --state-dir {state_dir}"
    return [f"What goes on, on a page in your browser:\n  agentweave console {who}"]


def _reachable(stack: RunningStack, client: SpiffeID) -> tuple[str | None, str]:
    file = grants_file(stack.config.policy_source)
    if file is None:
        return None, ""
    served = {str(agent.spiffe_id) for agent in stack.agents}
    callees = Grants.load(file).callees_of(client)
    reaches = [reach for reach in callees if reach.agent in served and "call" in reach.kinds]
    for reach in reaches:
        capability = "health" if "*" in reach.capabilities else reach.capabilities[0]
        return reach.agent, capability
    return None, ""


def _is_default(stack: RunningStack, client: SpiffeID) -> bool:
    return stack.clients[client] == Path.cwd() / STATE_DIR / "clients" / "cli.yaml"
