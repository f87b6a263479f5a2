"""``agentweave dev``: a whole stack with its agents in this process, taken up anew as their files change."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, aclosing
from functools import partial
from typing import Any, Final

import anyio

from agentweave_bus.cli.exit_codes import ExitCode, single_error
from agentweave_bus.cli.output import as_json, message, table, wants_json
from agentweave_bus.cli.reloading import file_names, refuse_production, stack_file
from agentweave_bus.cli.signals import ENDING, handled
from agentweave_bus.cli.stack_file import loaded_stack, log_as_configured
from agentweave_bus.cli.stack_ready import (
    clients_of,
    guidance,
    overridden_by,
    until_broker_ends,
    warnings_of,
)
from agentweave_bus.config import StackConfig
from agentweave_bus.dev.debugger import breakpoints_hold
from agentweave_bus.dev.logs import prefix_log
from agentweave_bus.dev.rest import LONGEST_TURN_S, RestingClock, RestingLoop
from agentweave_bus.dev.stack import ENVIRONMENT, DevStack, dev_stack
from agentweave_bus.dev.watching import changes, require_watchfiles
from agentweave_bus.exceptions import ConfigurationError

__all__ = ["add_arguments", "run"]

_EPILOG: Final = """\
Example:
  agentweave dev
  agentweave dev shop/agentweave.yaml --state-dir /tmp/shop

It is `up` for writing agents: the same broker, identities, grants and checks, but all agents live in this one
process, so breakpoint() and debuggers work. An agent whose files change is taken up anew, and grants and
policies are followed. While a debugger holds the process no deadline passes in it. Ctrl-C stops everything.
"""
_LONGEST_HOLD_S: Final = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.add_argument("file", nargs="?", metavar="FILE", help="the stack's YAML (default: agentweave.yaml)")
    parser.add_argument("--state-dir", metavar="DIR", help="instead of the file's state_dir (.agentweave)")
    parser.add_argument(
        "--hold",
        type=float,
        metavar="SECONDS",
        default=LONGEST_TURN_S,
        help=f"an event loop that does not come round for so long is held (default: {LONGEST_TURN_S:g})",
    )
    parser.add_argument("--json", action="store_true", help="say ready as JSON also in a terminal")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve the agents until a signal."""
    refuse_production(os.environ.get("AGENTWEAVE_ENV") or ENVIRONMENT, "agentweave dev")
    require_watchfiles()
    if not 0 < options.hold <= _LONGEST_HOLD_S:
        raise ConfigurationError(
            f"--hold {options.hold:g} is not more than 0 and at most {_LONGEST_HOLD_S:g} seconds.",
            key="--hold",
        )
    config = loaded_stack(options)
    log_as_configured(config)
    sys.dont_write_bytecode = True  # what was compiled a moment ago must not be taken for what is there now
    clock = RestingClock(options.hold)
    dev = _Dev(config, options, clock)
    with asyncio.Runner(loop_factory=lambda: RestingLoop(clock)) as runner:
        runner.run(dev.run())
    return dev.exit_code


class _Dev:
    """One run of the command."""

    def __init__(self, config: StackConfig, options: argparse.Namespace, clock: RestingClock) -> None:
        self.exit_code = ExitCode.DONE
        self._config = config
        self._json = options.json
        self._file = stack_file(options.file)
        self._clock = clock
        self._told = asyncio.Event()
        self._stopping = False
        self._stack: DevStack | None = None

    async def run(self) -> None:
        """Hold the stack until a signal, or until its broker has ended."""
        prefix_log(max((len(entry.config.stem) for entry in self._config.agents), default=0))
        with self._signals(), breakpoints_hold(asyncio.get_running_loop()):
            try:
                async with dev_stack(self._config, self._file, self._clock, say=_say) as stack:
                    self._stack = stack
                    self._say_ready(stack)
                    await self._hold(stack)
            except asyncio.CancelledError:
                if not self._stopping:
                    raise
            except BaseExceptionGroup as group:
                raise single_error(group) from group

    def _signals(self) -> AbstractContextManager[None]:
        task = asyncio.current_task()
        assert task is not None  # a coroutine of the loop
        return handled(dict.fromkeys(ENDING, partial(self._stop, task)))

    def _stop(self, task: asyncio.Task[None]) -> None:
        """End all in order; what is still coming up is cancelled. The second time nothing is waited for."""
        first, self._stopping = not self._stopping, True
        if self._stack is None:
            task.cancel()
        elif first:
            self._told.set()
        else:
            self._stack.served.kill()
        if first:
            message("stopping ...")

    async def _hold(self, stack: DevStack) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._follow, stack)
            group.start_soon(self._watch_broker, stack)
            await self._told.wait()
            group.cancel_scope.cancel()

    async def _follow(self, stack: DevStack) -> None:
        """Take up what changes."""
        async with aclosing(changes(stack.watched.folders)) as all_changes:
            async for changed in all_changes:
                names = stack.watched.concerned(changed)
                if stack.watched.stack_file in changed:
                    _say(
                        f"{file_names(changed)}: start `agentweave dev` again to follow the stack's own file."
                    )
                if names or len(stack.served.serving) < len(stack.agents):
                    _say(f"{file_names(changed)} changed")
                    await stack.served.take_up(names)
                    _say(f"serving {', '.join(stack.served.serving) or 'nobody'}")

    async def _watch_broker(self, stack: DevStack) -> None:
        self.exit_code = await until_broker_ends(stack)
        self._told.set()

    def _say_ready(self, stack: DevStack) -> None:
        for warning in (*warnings_of(self._config), *_left_out(stack)):
            message(f"agentweave: {warning}")
        facts = _facts(stack)
        print(as_json(facts) if wants_json(self._json) else _ready_text(stack, facts), flush=True)


def _left_out(stack: DevStack) -> Iterator[str]:
    """Say what of the stack's file has no meaning in one process."""
    for agent in stack.agents:
        if len(agent.replicas) > 1:
            yield f"{agent.config.agent.name} is served once here, not {len(agent.replicas)} times."
        if agent.entry.uid is not None:
            yield f"{agent.config.agent.name} runs as this user here, not as user {agent.entry.uid}."


def _facts(stack: DevStack) -> dict[str, Any]:
    return {
        "ready": True,
        "seconds": round(stack.seconds, 3),
        "trust_domain": stack.config.trust_domain,
        "broker": stack.stack.bus_url,
        "broker_pid": stack.stack.nats.pid,
        "pid": os.getpid(),
        "agents": [
            {
                "name": agent.config.agent.name,
                "spiffe_id": str(agent.spiffe_id),
                "served": agent.config.agent.name in stack.served.serving,
            }
            for agent in stack.agents
        ],
        "clients": clients_of(stack),
        "overridden": overridden_by(stack),
    }


def _ready_text(stack: DevStack, facts: dict[str, Any]) -> str:
    where = f"trust domain {facts['trust_domain']}, broker {facts['broker']}"
    lines = [f"Ready after {facts['seconds']:.1f} s, all in process {facts['pid']}: {where}"]
    if facts["agents"]:
        rows = [
            (one["name"], one["spiffe_id"], "" if one["served"] else "not served") for one in facts["agents"]
        ]
        lines.append(table(rows))
    return "\n".join((*lines, *guidance(stack), "What changes is taken up. Ctrl-C stops it all."))


def _say(text: str) -> None:
    message(f"agentweave: {text}")
