"""``agentweave serve``: one agent in this process, against whatever its configuration names."""

from __future__ import annotations

import argparse
from typing import Final

from agentweave_bus.cli.exit_codes import ExitCode, single_error
from agentweave_bus.worker import run_on_fastest_loop, serve

__all__ = ["add_arguments", "run"]

_EPILOG: Final = """\
Example:
  agentweave serve order.yaml
  agentweave serve config.dev.yaml --env development --class shop.order:OrderAgent

It serves until Ctrl-C or SIGTERM and ends what is being handled first.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "file", nargs="?", metavar="FILE", help="the agent's YAML (default: AGENTWEAVE_CONFIG)"
    )
    parser.add_argument(
        "--env", choices=("production", "development"), help="instead of AGENTWEAVE_ENV; else production"
    )
    parser.add_argument("--class", dest="class_path", metavar="MODULE:CLASS", help="instead of agent.class")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until told to stop."""
    try:
        run_on_fastest_loop(serve(options.file, environment=options.env, class_path=options.class_path))
    except KeyboardInterrupt:
        return ExitCode.DONE  # Ctrl-C before it listened to signals is meant in the same way
    except BaseExceptionGroup as group:
        raise single_error(group) from group
    return ExitCode.DONE
