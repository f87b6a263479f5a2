"""``agentweave agents asyncapi``: what an agent can be sent, for people and generators who know AsyncAPI."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Final

import yaml

from agentweave_bus.agent.asyncapi import describe_agent
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.cli.output import as_json, wants_json
from agentweave_bus.config import load_config
from agentweave_bus.observability.printable import escape_text
from agentweave_bus.worker import find_agent

__all__ = ["add_arguments", "run_asyncapi"]

_EPILOG: Final = """\
Example:
  agentweave agents asyncapi order.yaml
  agentweave agents asyncapi order.yaml --class shop.order:OrderAgent --yaml > order.asyncapi.yaml

The agent's code is imported, as `serve` does; nothing is connected or served.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = "Example:\n  agentweave agents asyncapi order.yaml\n"
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    asyncapi = commands.add_parser(
        "asyncapi",
        help="print the AsyncAPI 3.0 document of an agent",
        description="Print the AsyncAPI 3.0 document of an agent: its subjects, and what is sent there.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    asyncapi.add_argument("file", metavar="FILE", help="the agent's YAML")
    asyncapi.add_argument("--class", dest="class_path", metavar="MODULE:CLASS", help="instead of agent.class")
    asyncapi.add_argument(
        "--env", choices=("production", "development"), help="instead of AGENTWEAVE_ENV; else production"
    )
    form = asyncapi.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON also in a terminal")
    form.add_argument("--yaml", action="store_true", help="as YAML also in a pipe or a file")
    asyncapi.set_defaults(run=run_asyncapi)


def run_asyncapi(options: argparse.Namespace) -> int:
    """Print the document."""
    config = load_config(options.file, environment=options.env)
    sys.path.append(str(Path(options.file).absolute().parent))  # as a worker does
    document = describe_agent(find_agent(config, options.class_path))
    if wants_json(options.json) and not options.yaml:
        print(as_json(document))
    else:
        unshared = json.loads(json.dumps(document))  # else YAML would have anchors
        text = yaml.safe_dump(unshared, sort_keys=False, allow_unicode=True, width=110)
        print(escape_text(text.rstrip()))
    return ExitCode.DONE
