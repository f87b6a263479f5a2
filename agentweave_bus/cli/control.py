"""``agentweave control``: the control role of a trust domain, at brokers of one's own."""

from __future__ import annotations

import argparse
from typing import Final

from agentweave_bus.cli.exit_codes import ExitCode, single_error
from agentweave_bus.config import load_control
from agentweave_bus.runtime.control_service import serve_control
from agentweave_bus.worker import run_on_fastest_loop

__all__ = ["add_arguments", "run"]

_EPILOG: Final = """\
Example:
  agentweave control control.yaml
  agentweave control control.yaml --env development

It makes the streams and consumers that agents need, wakes delayed tasks and answers operators, until Ctrl-C
or SIGTERM. `agentweave up` has one of its own.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.add_argument("file", metavar="FILE", help="the control role's YAML")
    parser.add_argument(
        "--env", choices=("production", "development"), help="instead of AGENTWEAVE_ENV; else production"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Be the control role until told to stop."""
    config = load_control(options.file, environment=options.env)
    try:
        run_on_fastest_loop(serve_control(config))
    except KeyboardInterrupt:
        return ExitCode.DONE  # Ctrl-C before it listened to signals is meant in the same way
    except BaseExceptionGroup as group:
        raise single_error(group) from group
    return ExitCode.DONE
