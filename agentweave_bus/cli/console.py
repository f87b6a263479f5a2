"""``agentweave console``: a page in the browser that shows what goes on."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Final

from agentweave_bus.cli.client_config import STATE_DIR, add_identity_arguments, find_client_config
from agentweave_bus.cli.exit_codes import ExitCode, single_error
from agentweave_bus.cli.output import message, wants_json
from agentweave_bus.cli.signals import ENDING, handled
from agentweave_bus.config import AgentConfig
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.observability.logs import configure_logging
from agentweave_bus.supervisor.control_socket import SOCKET_NAME
from agentweave_bus.worker import run_on_fastest_loop

__all__ = ["add_arguments", "run"]

_EPILOG: Final = """\
Example:
  agentweave console --as operator
  agentweave console --as operator --actions --port 8600

It shows agents and their workers, tasks, queues, dead letters and decisions, and changes nothing without
--actions. The address that it prints opens it once; a new one is printed then. Who may look is an operator
who may control:observe.
"""
_WARNING: Final = "what the console shows goes over the network as plain HTTP: whoever is between reads it."
_EXTRA: Final = frozenset({"starlette", "uvicorn", "h11", "click"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    add_identity_arguments(parser)
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        default=str(STATE_DIR),
        help=f"where the supervisor's socket and the audit logs are ({STATE_DIR})",
    )
    parser.add_argument(
        "--port", type=int, default=0, metavar="N", help="where it listens (default: any free)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="likewise (default: this machine alone)"
    )
    parser.add_argument(
        "--plain-http", action="store_true", help="let --host be an address that others can reach"
    )
    parser.add_argument(
        "--actions", action="store_true", help="let the page approve, reject, cancel, redrive and drop"
    )
    parser.add_argument("--json", action="store_true", help="print addresses as JSON also in a terminal")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve the page until a signal."""
    config = find_client_config(options)
    configure_logging(config.observability.logging)
    try:
        run_on_fastest_loop(_serve(config, options))
    except KeyboardInterrupt:
        return ExitCode.DONE  # Ctrl-C before it listened to signals is meant in the same way
    except BaseExceptionGroup as group:
        raise single_error(group) from group
    return ExitCode.DONE


async def _serve(config: AgentConfig, options: argparse.Namespace) -> None:
    try:
        from agentweave_bus.console import open_console  # noqa: PLC0415 - of the extra
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        raise ConfigurationError(
            "The console needs packages that are not installed.",
            key="console",
            hint="Install them with: pip install 'agentweave-bus[console]'",
        ) from error
    directory, ended = Path(options.state_dir), asyncio.Event()
    as_json = wants_json(options.json)

    def show(url: str) -> None:
        print(json.dumps({"url": url}) if as_json else f"The console: {url}", flush=True)

    if options.plain_http:
        message(f"agentweave: {_WARNING}")
    with handled(dict.fromkeys(ENDING, ended.set)):
        async with open_console(
            operator=config,
            workers=directory / SOCKET_NAME,
            audit=directory / "audit",
            host=options.host,
            port=options.port,
            plain_http=options.plain_http,
            actions=options.actions,
            on_url=show,
        ):
            if sys.stderr.isatty():
                message("It opens once; a new address is printed then. Ctrl-C ends it.")
            await ended.wait()
