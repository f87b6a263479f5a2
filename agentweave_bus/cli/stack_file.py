"""What the commands that run a stack's workers have in common: their arguments, and how its file is taken."""

from __future__ import annotations

import argparse
import os
import sys

from agentweave_bus.config import StackConfig, load_stack
from agentweave_bus.observability.logs import configure_logging

__all__ = ["add_stack_arguments", "loaded_stack", "log_as_configured"]


def add_stack_arguments(parser: argparse.ArgumentParser, *, state_dir_help: str) -> None:
    """Add what follows the name of the file."""
    parser.add_argument("--state-dir", metavar="DIR", help=state_dir_help)
    parser.add_argument(
        "--env", choices=("production", "development"), help="for the agents, instead of AGENTWEAVE_ENV"
    )
    parser.add_argument("--json", action="store_true", help="say ready as JSON also in a terminal")


def loaded_stack(options: argparse.Namespace) -> StackConfig:
    """Load the file of the arguments, whose state directory comes first. Raises ConfigurationError."""
    if options.state_dir is not None:
        os.environ["AGENTWEAVE_STACK__STATE_DIR"] = options.state_dir
    return load_stack(options.file)


def log_as_configured(config: StackConfig) -> None:
    """Log as the stack's file says; for people in a terminal, where it does not choose."""
    logging = config.observability.logging
    if sys.stderr.isatty() and "format" not in logging.model_fields_set:
        logging = logging.model_copy(update={"format": "text"})
    configure_logging(logging)
