"""The command line, ``agentweave``.

Each command (or group of commands) is a module with ``add_arguments(parser)`` and ``run(options)``; only
the one that is called is imported, so that asking for help stays quick. Errors of the package become exit
codes and messages in :mod:`.exit_codes`; ``docs/command-line.md`` describes every command.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from agentweave_bus.cli.commands import add_command
from agentweave_bus.cli.exit_codes import ExitCode, exit_code_of, message_of, single_error
from agentweave_bus.cli.output import message
from agentweave_bus.exceptions import AgentWeaveError

__all__ = ["COMMANDS", "build_parser", "main"]

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "new": ("agentweave_bus.cli.new", "write a runnable agent with grants and a test"),
    "up": ("agentweave_bus.cli.up", "start a whole stack on this machine: broker, identities, agents"),
    "dev": ("agentweave_bus.cli.dev", "serve a stack's agents in one process, anew as their files change"),
    "serve": ("agentweave_bus.cli.serve", "serve one agent in this process"),
    "control": ("agentweave_bus.cli.control", "be the control role at brokers of one's own"),
    "supervise": ("agentweave_bus.cli.supervise", "keep workers running against existing infrastructure"),
    "supervisor": ("agentweave_bus.cli.supervisor", "look at a running supervisor, and tell it what to do"),
    "call": ("agentweave_bus.cli.call", "ask an agent for a capability and print its result"),
    "submit": ("agentweave_bus.cli.submit", "store a durable task for an agent and print its reference"),
    "task": ("agentweave_bus.cli.task", "look at, watch, cancel or list durable tasks"),
    "dlq": ("agentweave_bus.cli.dlq", "list, show, redrive or drop dead letters, as an operator"),
    "console": ("agentweave_bus.cli.console", "show what goes on, on a page in the browser"),
    "publish": ("agentweave_bus.cli.publish", "publish an event for whoever may receive it"),
    "ping": ("agentweave_bus.cli.ping", "ask an agent for its health and say how long it took"),
    "why": ("agentweave_bus.cli.why", "tell what became of a call, and what would allow it"),
    "authz": (
        "agentweave_bus.cli.authz",
        "try policies, print the broker's users, and revoke",
    ),
    "audit": ("agentweave_bus.cli.audit", "verify audit logs, or show what they say"),
    "agents": ("agentweave_bus.cli.agents", "describe agents as AsyncAPI documents"),
    "identity": ("agentweave_bus.cli.identity", "show or fetch an SVID and its trust bundles"),
    "doctor": ("agentweave_bus.cli.doctor", "find what is wrong here, and say what to do about it"),
    "config": ("agentweave_bus.cli.config", "check a configuration and print what is in effect"),
}
"""Name of a command: its module, and what it does."""

_EPILOG: Final = """\
Begin with:
  agentweave new hello && cd hello && agentweave up

Exit codes: 0 done, 1 the task failed, 2 usage or configuration, 3 denied, 4 unreachable or timed out.
"""
_INTERRUPTED: Final = 130  # what shells expect after SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with ``arguments`` (the process's own by default); return the exit code."""
    _hear_ctrl_c()
    given = list(sys.argv[1:] if arguments is None else arguments)
    with _uncollected():
        parser = build_parser(given)
    options = parser.parse_args(given)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has left; there is nobody to tell
        return int(ExitCode.FAILED)
    except (AgentWeaveError, OSError, BaseExceptionGroup) as raised:
        return _explain(raised)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Import without looking for garbage: none of it is any, and looking takes a seventh of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _hear_ctrl_c() -> None:
    """Let SIGINT interrupt, also where it was inherited as ignored.

    A shell without job control starts what stands before ``&`` so; ``up``, ``serve`` and ``audit tail -f``
    end by SIGINT and by nothing of their own.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _explain(raised: BaseException) -> int:
    error = single_error(raised)
    if isinstance(error, AgentWeaveError):
        code = exit_code_of(error)
        message(f"agentweave: {message_of(error)}")
        return int(code)
    if isinstance(error, OSError) and error.filename is not None:
        message(f"agentweave: {error.filename}: {error.strerror}.")
        return int(ExitCode.USAGE)
    raise error


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps every command and its summary on one line: argparse forgets that commands are indented."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = max(map(len, COMMANDS)) + 4


def build_parser(arguments: Sequence[str], *, every: bool = False) -> argparse.ArgumentParser:
    """Return the parser for ``arguments``; with ``every`` command's own arguments, or the named one's."""
    parser = argparse.ArgumentParser(
        prog="agentweave",
        description="Signed, authorized agents on a NATS bus.",
        epilog=_EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"agentweave {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = add_command(commands, name, summary)
        if every or name in arguments:
            importlib.import_module(module).add_arguments(command)
    return parser


def _version() -> str:
    return str(importlib.import_module("agentweave_bus").__version__)
