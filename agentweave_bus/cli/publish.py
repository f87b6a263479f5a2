"""``agentweave publish``: an event, for whoever may receive it."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any, Final

from agentweave_bus.cli.arguments import parse_json, read_text
from agentweave_bus.cli.client_config import add_identity_arguments, find_client_config
from agentweave_bus.cli.exit_codes import ExitCode, single_error
from agentweave_bus.cli.output import print_result
from agentweave_bus.config import AgentConfig
from agentweave_bus.runtime import AgentWeaveClient
from agentweave_bus.tasks.publishing import DEFAULT_EVENT_SECONDS, PublishedEvent

__all__ = ["add_arguments", "run"]

_EPILOG: Final = """\
Example:
  agentweave publish order.created --data '{"order_id": "o-17"}' --key o-17

It is stored when this returns. Who hears of it is said by the grants of kind event.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "name", metavar="NAME", help="the event: parts of a-z, 0-9, '_' and '-' with dots between"
    )
    parser.add_argument(
        "--data",
        default="{}",
        metavar="JSON",
        help="what its handlers take: JSON, @file, or - for standard input",
    )
    parser.add_argument("--key", metavar="TEXT", help="what it is about: an order's id, say")
    parser.add_argument(
        "--deadline",
        type=float,
        default=DEFAULT_EVENT_SECONDS,
        metavar="SECONDS",
        help="it is handled until then (default, and at most: seven days)",
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for the storing")
    parser.add_argument("--json", action="store_true", help="as JSON also in a terminal")
    add_identity_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Publish the event and print what names it."""
    config = find_client_config(options)
    data = parse_json(read_text(options.data), "--data")
    more = {"key": options.key, "deadline": options.deadline, "timeout": options.timeout}
    published = asyncio.run(_publish(config, options.name, data, more))
    facts = {"name": published.name, "id": published.id, "digest": published.digest}
    print_result(facts, f"{published.id}\nIt is stored.", json_wanted=options.json)
    return ExitCode.DONE


async def _publish(config: AgentConfig, name: str, data: Any, more: dict[str, Any]) -> PublishedEvent:
    try:
        async with AgentWeaveClient(config) as client:
            return await client.publish(name, data, **more)
    except BaseExceptionGroup as group:
        raise single_error(group) from group
