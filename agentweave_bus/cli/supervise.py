"""``agentweave supervise``: workers of a file, against whatever infrastructure their configurations name."""

from __future__ import annotations

import argparse
import asyncio
import signal
from contextlib import AbstractContextManager, suppress
from typing import Any, Final

import anyio

from agentweave_bus.cli.exit_codes import ExitCode, single_error
from agentweave_bus.cli.output import as_json, message, show_line, wants_json
from agentweave_bus.cli.reloading import (
    add_reload_argument,
    prepare_reloading,
    replace_on_change,
    stack_file,
)
from agentweave_bus.cli.signals import ENDING, handled
from agentweave_bus.cli.stack_file import add_stack_arguments, loaded_stack, log_as_configured
from agentweave_bus.config import StackConfig
from agentweave_bus.dev.concerned import WatchedStack
from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError, WorkerError
from agentweave_bus.supervisor.control_socket import SOCKET_NAME, control_socket
from agentweave_bus.supervisor.listener import supervisor_listener
from agentweave_bus.supervisor.plans import planned_agents, plans_of
from agentweave_bus.supervisor.requests import answering
from agentweave_bus.supervisor.supervisor import Supervisor, supervised

__all__ = ["add_arguments", "run"]

_EPILOG: Final = """\
Example:
  agentweave supervise agentweave.yaml
  agentweave supervise agentweave.yaml --state-dir /run/shop --env production
  agentweave supervise agentweave.yaml --reload --env development
  agentweave supervisor status --state-dir /run/shop

It starts no broker, no identities and no policies: the agents' own files say where those are. Ctrl-C or
SIGTERM ends all workers in order; a second one does not wait for what is still being handled. SIGHUP reads
the files again and replaces the workers one by one.

Exit codes: 0 told to stop, 1 no worker is left that would be started again, 2 usage or configuration.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.add_argument("file", metavar="FILE", help="the YAML that lists the agents, as `up` takes it")
    add_stack_arguments(parser, state_dir_help="of its socket, instead of the file's state_dir")
    add_reload_argument(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Keep the workers running until a signal."""
    prepare_reloading(options)
    config = _loaded(options)
    log_as_configured(config)
    supervise = _Supervise(config, options)
    try:
        asyncio.run(supervise.run())
    except BaseExceptionGroup as group:
        raise single_error(group) from group
    return supervise.exit_code


def _loaded(options: argparse.Namespace) -> StackConfig:
    config = loaded_stack(options)
    if not config.agents:
        raise ConfigurationError(
            f"{options.file} lists no agents.", key="agents", hint="Add one: agents: [{config: order.yaml}]."
        )
    return config


class _Supervise:
    """One run of the command."""

    def __init__(self, config: StackConfig, options: argparse.Namespace) -> None:
        self.exit_code = ExitCode.DONE
        self._options = options
        self._metrics = config.observability.metrics
        self._socket = config.state_dir.absolute() / SOCKET_NAME
        self._config = config
        self._agents = planned_agents(config, options.env)
        self._plans = plans_of(self._agents, options.env)
        self._width = max(len(name) for plan in self._plans for name in plan.places)
        self._told = anyio.Event()
        self._reload = anyio.Event()

    async def run(self) -> None:
        """Hold the workers until a signal, or until none is left."""
        async with supervised(on_line=self._show_line, on_event=_say) as supervisor:
            with self._signals(supervisor):
                async with supervisor_listener(self._metrics, supervisor) as url:
                    await self._hold(supervisor, url)
                await _ended(supervisor)

    async def _hold(self, supervisor: Supervisor, metrics_url: str | None) -> None:
        """Keep the workers as they should be until somebody says to stop, or none is left."""
        async with (
            control_socket(self._socket, answering(supervisor, lambda: self._roll(supervisor))),
            anyio.create_task_group() as group,
        ):
            group.start_soon(self._start, supervisor, metrics_url)
            group.start_soon(self._watch, supervisor)
            group.start_soon(self._heed_reloads, supervisor)
            if self._options.reload:
                group.start_soon(self._follow_files, supervisor)
            await self._told.wait()
            group.cancel_scope.cancel()

    async def _start(self, supervisor: Supervisor, metrics_url: str | None) -> None:
        with suppress(WorkerError):  # it was told as it happened, and the others go on
            await supervisor.start(self._plans)
            facts = {
                "ready": True,
                "socket": str(self._socket),
                "metrics": metrics_url,
                "workers": supervisor.status(),
            }
            print(as_json(facts) if wants_json(self._options.json) else _ready_text(facts), flush=True)

    async def _watch(self, supervisor: Supervisor) -> None:
        await supervisor.until_nobody_works()
        message("agentweave: no worker is left.")
        self.exit_code = ExitCode.FAILED
        self._told.set()

    async def _heed_reloads(self, supervisor: Supervisor) -> None:
        while True:
            await self._reload.wait()
            self._reload = anyio.Event()
            await self._roll_and_tell(supervisor)

    async def _follow_files(self, supervisor: Supervisor) -> None:
        """Replace workers whose files change, and all of them when the file does that lists them."""

        async def take_up_stack_file() -> WatchedStack:
            await self._roll_and_tell(supervisor)
            return self._watched()

        await replace_on_change(self._watched(), supervisor.restart, _say, take_up_stack_file)

    def _watched(self) -> WatchedStack:
        return WatchedStack(self._config, self._agents, stack_file(self._options.file))

    async def _roll_and_tell(self, supervisor: Supervisor) -> None:
        try:
            await self._roll(supervisor)
        except ConfigurationError as error:
            message(f"agentweave: everything stays as it was: {error}")
        except AgentWeaveError as error:
            message(f"agentweave: replacing the workers ends here: {error}")

    async def _roll(self, supervisor: Supervisor) -> None:
        config = _loaded(self._options)
        self._agents, self._config = planned_agents(config, self._options.env), config
        await supervisor.reload(plans_of(self._agents, self._options.env))

    def _signals(self, supervisor: Supervisor) -> AbstractContextManager[None]:
        def stop() -> None:
            if self._told.is_set():
                supervisor.kill()
            else:
                self._told.set()
                message("stopping ...")

        def reload() -> None:
            self._reload.set()  # another one each time

        return handled({**dict.fromkeys(ENDING, stop), signal.SIGHUP: reload})

    def _show_line(self, worker: str, line: str) -> None:
        show_line(worker, self._width, line)


async def _ended(supervisor: Supervisor) -> None:
    """End all workers in order while signals are still heard."""
    supervisor.drain()
    await supervisor.until_all_have_ended()


def _say(text: str) -> None:
    message(f"agentweave: {text}")


def _ready_text(facts: dict[str, Any]) -> str:
    names = ", ".join(one["name"] for one in facts["workers"])
    where = f"; metrics of all on {facts['metrics']}" if facts["metrics"] else ""
    return f"Ready: {names}\n`agentweave supervisor status` asks at {facts['socket']}{where}."
