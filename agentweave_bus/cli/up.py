"""``agentweave up``: a whole stack on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import anyio

from agentweave_bus.authz import Grants
from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.cli.exit_codes import ExitCode, single_error
from agentweave_bus.cli.output import as_json, message, table, wants_json
from agentweave_bus.cli.stack_file import add_stack_arguments, loaded_stack, log_as_configured
from agentweave_bus.config import StackConfig
from agentweave_bus.embedded.assembly import LocalStack, local_stack, policy_source
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.supervisor.control_socket import SOCKET_NAME, control_socket
from agentweave_bus.supervisor.listener import supervisor_listener
from agentweave_bus.supervisor.requests import answering
from agentweave_bus.worker import run_on_fastest_loop

__all__ = ["add_arguments", "run"]

_EPILOG: Final = """\
Example:
  agentweave up
  agentweave up shop/agentweave.yaml --state-dir /tmp/shop --env development

Without FILE it takes agentweave.yaml of this directory. Workers that end are started again; `agentweave
supervisor status` shows them. Ctrl-C stops everything and leaves only the state; a second Ctrl-C does not
wait for what is still being handled.
"""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.add_argument("file", nargs="?", metavar="FILE", help="the stack's YAML (default: agentweave.yaml)")
    add_stack_arguments(parser, state_dir_help="instead of the file's state_dir (.agentweave)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Start the stack, say when it is ready, and keep it until a signal."""
    config = loaded_stack(options)
    log_as_configured(config)
    stack = _Up(config, options)
    run_on_fastest_loop(stack.run())
    return stack.exit_code


class _Up:
    """One run of the command."""

    def __init__(self, config: StackConfig, options: argparse.Namespace) -> None:
        self.exit_code = ExitCode.DONE
        self._stack: LocalStack | None = None
        self._stopping = False
        self._config = config
        self._options = options
        names = [entry.config.stem for entry in config.agents]
        self._width = max((len(name) for name in names), default=0)

    async def run(self) -> None:
        """Hold the stack until a signal, or until its broker or its last worker has ended."""
        with self._signals():
            try:
                async with local_stack(
                    self._config,
                    self._show_line,
                    environment=self._options.env,
                    text_logs=sys.stderr.isatty(),
                    on_event=self._say,
                ) as stack:
                    self._stack = stack
                    socket = self._config.state_dir.absolute() / SOCKET_NAME
                    metrics = self._config.observability.metrics
                    async with (
                        supervisor_listener(metrics, stack.workers) as url,
                        control_socket(socket, answering(stack.workers, stack.workers.roll)),
                    ):
                        self._say_ready(stack, url)
                        await self._hold(stack)
            except asyncio.CancelledError:
                if not self._stopping:
                    raise
            except BaseExceptionGroup as group:
                raise single_error(group) from group

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a cancellation of this task, which ends all in order.

        A plain cancellation comes once, so that what is taken down can still wait for its own end. (An
        anyio scope would cancel every wait of the taking down, too.)
        """
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None  # a coroutine of the loop
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop, task)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _stop(self, task: asyncio.Task[None]) -> None:
        if not self._stopping:
            self._stopping = True
            message("stopping ...")
            task.cancel()
        elif self._stack is not None:
            self._stack.workers.kill()

    async def _hold(self, stack: LocalStack) -> None:
        """Wait until nobody works any more. Without any worker there is still the broker to hold."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._watch_broker, stack, group.cancel_scope)
            await stack.workers.until_nobody_works()
            message("agentweave: no worker is left.")
            self.exit_code = ExitCode.FAILED
            group.cancel_scope.cancel()

    async def _watch_broker(self, stack: LocalStack, scope: anyio.CancelScope) -> None:
        code = await stack.stack.nats.wait()
        message(f"agentweave: the broker ended (exit code {code}); nobody can be reached any more.")
        self.exit_code = ExitCode.UNREACHABLE
        scope.cancel()

    def _say(self, text: str) -> None:
        if self._stack is not None:  # what keeps a worker from starting ends the command, which says it
            message(f"agentweave: {text}")

    def _show_line(self, worker: str, line: str) -> None:
        sys.stderr.write(f"{worker.ljust(self._width)} | {line}\n")

    def _say_ready(self, stack: LocalStack, metrics_url: str | None) -> None:
        for warning in _warnings(self._config):
            message(f"agentweave: {warning}")
        facts = _facts(stack, metrics_url)
        print(as_json(facts) if wants_json(self._options.json) else _ready_text(stack, facts), flush=True)


def _warnings(config: StackConfig) -> tuple[str, ...]:
    source = policy_source(config)
    if source is None:
        return ("neither grants nor policies in the stack's file: nobody may call anybody.",)
    file = grants_file(source)
    if file is None:
        return (f"{source} has no grants.yaml: the broker lets nobody call anybody, whatever policies say.",)
    return tuple(f"{file}: {text}" for text in Grants.load(file).warnings())


def _facts(stack: LocalStack, metrics_url: str | None) -> dict[str, Any]:
    workers = {worker.spec.name: worker for worker in stack.workers.all}
    return {
        "ready": True,
        "seconds": round(stack.seconds, 3),
        "trust_domain": stack.config.trust_domain,
        "broker": stack.stack.bus_url,
        "broker_pid": stack.stack.nats.pid,
        "metrics": metrics_url,
        "agents": [
            {
                "name": name,
                "spiffe_id": str(agent.spiffe_id),
                "pid": workers[name].pid,
                "metrics": workers[name].metrics_url,
            }
            for agent in stack.agents
            for name in agent.replicas
        ],
        "clients": {str(identity): str(path) for identity, path in stack.clients.items()},
        "overridden": [
            {"agent": one.agent, "key": one.key, "was": one.was, "by": one.variable}
            for one in stack.overridden
        ],
    }


def _ready_text(stack: LocalStack, facts: dict[str, Any]) -> str:
    where = f"trust domain {facts['trust_domain']}, broker {facts['broker']}"
    lines = [f"Ready after {facts['seconds']:.1f} s: {where}"]
    if facts["agents"]:
        rows = [
            (one["name"], one["spiffe_id"], f"pid {one['pid']}", one["metrics"] or "no metrics")
            for one in facts["agents"]
        ]
        lines.append(table(rows))
    if facts["metrics"] and len(facts["agents"]) > 1:
        lines.append(f"Metrics of all of them: {facts['metrics']}")
    if facts["overridden"]:
        lines.append("In place of what the agents' files say, this stack is used:")
        rows = [(one["agent"], one["key"], one["was"], f"by {one['by']}") for one in facts["overridden"]]
        lines.append(table(rows))
    lines += _how_to_call(stack)
    return "\n".join((*lines, "Ctrl-C stops it all."))


def _how_to_call(stack: LocalStack) -> list[str]:
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


def _reachable(stack: LocalStack, client: SpiffeID) -> tuple[str | None, str]:
    file = grants_file(policy_source(stack.config))
    if file is None:
        return None, ""
    served = {str(agent.spiffe_id) for agent in stack.agents}
    callees = Grants.load(file).callees_of(client)
    reaches = [reach for reach in callees if reach.agent in served and "call" in reach.kinds]
    for reach in reaches:
        capability = "health" if "*" in reach.capabilities else reach.capabilities[0]
        return reach.agent, capability
    return None, ""


def _is_default(stack: LocalStack, client: SpiffeID) -> bool:
    return stack.clients[client] == Path.cwd() / ".agentweave" / "clients" / "cli.yaml"
