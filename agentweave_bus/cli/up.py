"""``agentweave up``: a whole stack on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import sys
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final

import anyio

from agentweave_bus.cli.exit_codes import ExitCode, single_error
from agentweave_bus.cli.output import as_json, message, show_line, table, wants_json
from agentweave_bus.cli.reloading import (
    add_reload_argument,
    prepare_reloading,
    replace_on_change,
    stack_file,
)
from agentweave_bus.cli.signals import ENDING, handled
from agentweave_bus.cli.stack_file import add_stack_arguments, loaded_stack, log_as_configured
from agentweave_bus.cli.stack_ready import (
    clients_of,
    guidance,
    overridden_by,
    until_broker_ends,
    warnings_of,
)
from agentweave_bus.config import StackConfig
from agentweave_bus.dev.concerned import WatchedStack
from agentweave_bus.embedded.assembly import LocalStack, local_stack
from agentweave_bus.supervisor.control_socket import SOCKET_NAME, control_socket
from agentweave_bus.supervisor.listener import supervisor_listener
from agentweave_bus.supervisor.requests import answering
from agentweave_bus.supervisor.supervisor import Supervisor
from agentweave_bus.worker import run_on_fastest_loop

__all__ = ["add_arguments", "run"]

_EPILOG: Final = """\
Example:
  agentweave up
  agentweave up shop/agentweave.yaml --state-dir /tmp/shop
  agentweave up --reload --env development

Without FILE it takes agentweave.yaml of this directory. Workers that end are started again; `agentweave
supervisor status` shows them. Ctrl-C stops everything and leaves only the state; a second Ctrl-C does not
wait for what is still being handled.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.add_argument("file", nargs="?", metavar="FILE", help="the stack's YAML (default: agentweave.yaml)")
    add_stack_arguments(parser, state_dir_help="instead of the file's state_dir (.agentweave)")
    add_reload_argument(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Start the stack, say when it is ready, and keep it until a signal."""
    prepare_reloading(options)
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
        self._workers: Supervisor | None = None
        """Whoever is to be killed by a second Ctrl-C, also while the stack comes up."""
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
                    on_workers=self._note_workers,
                ) as stack:
                    self._stack = stack
                    socket = self._config.state_dir.absolute() / SOCKET_NAME
                    metrics = self._config.observability.metrics
                    async with (
                        supervisor_listener(metrics, stack.workers) as url,
                        control_socket(socket, answering(stack.workers, stack.workers.reload)),
                    ):
                        self._say_ready(stack, url)
                        await self._hold(stack)
            except asyncio.CancelledError:
                if not self._stopping:
                    raise
            except BaseExceptionGroup as group:
                raise single_error(group) from group

    def _signals(self) -> AbstractContextManager[None]:
        """Turn the first SIGINT or SIGTERM into a cancellation of this task, which ends all in order.

        A plain cancellation comes once, so that what is taken down can still wait for its own end. (An
        anyio scope would cancel every wait of the taking down, too.)
        """
        task = asyncio.current_task()
        assert task is not None  # a coroutine of the loop
        return handled(dict.fromkeys(ENDING, partial(self._stop, task)))

    def _stop(self, task: asyncio.Task[None]) -> None:
        if not self._stopping:
            self._stopping = True
            task.cancel()
            message("stopping ...")
        elif self._workers is not None:
            self._workers.kill()

    def _note_workers(self, workers: Supervisor) -> None:
        self._workers = workers

    async def _hold(self, stack: LocalStack) -> None:
        """Wait until nobody works any more. Without any worker there is still the broker to hold."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._watch_broker, stack, group.cancel_scope)
            if self._options.reload:
                watched = WatchedStack(self._config, stack.agents, stack_file(self._options.file))
                group.start_soon(replace_on_change, watched, stack.workers.restart, self._say)
            await stack.workers.until_nobody_works()
            message("agentweave: no worker is left.")
            self.exit_code = ExitCode.FAILED
            group.cancel_scope.cancel()

    async def _watch_broker(self, stack: LocalStack, scope: anyio.CancelScope) -> None:
        self.exit_code = await until_broker_ends(stack)
        scope.cancel()

    def _say(self, text: str) -> None:
        if self._stack is not None:  # what keeps a worker from starting ends the command, which says it
            message(f"agentweave: {text}")

    def _show_line(self, worker: str, line: str) -> None:
        show_line(worker, self._width, line)

    def _say_ready(self, stack: LocalStack, metrics_url: str | None) -> None:
        for warning in warnings_of(self._config):
            message(f"agentweave: {warning}")
        facts = _facts(stack, metrics_url)
        print(as_json(facts) if wants_json(self._options.json) else _ready_text(stack, facts), flush=True)


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
                "spiffe_endpoint": stack.stack.api.endpoint(agent.spiffe_id),
            }
            for agent in stack.agents
            for name in agent.replicas
        ],
        "clients": clients_of(stack),
        "overridden": overridden_by(stack),
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
    return "\n".join((*lines, *guidance(stack), "Ctrl-C stops it all."))
