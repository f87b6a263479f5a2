"""``agentweave call``: one call, and its result as JSON."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any, Final

from agentweave_bus.cli.arguments import parse_json, parse_principal, parse_scope, read_text
from agentweave_bus.cli.client_config import add_identity_arguments, find_client_config
from agentweave_bus.cli.exit_codes import ExitCode, single_error
from agentweave_bus.cli.output import message, print_result
from agentweave_bus.cli.stack_agents import misspelt
from agentweave_bus.config import AgentConfig
from agentweave_bus.exceptions import AgentCallError
from agentweave_bus.observability.printable import escape_line
from agentweave_bus.runtime import AgentWeaveClient
from agentweave_bus.types import TaskResult

__all__ = ["add_arguments", "call_once", "run"]

_EPILOG: Final = """\
Example:
  agentweave call --target spiffe://shop.test/agent/order --capability get_order \\
      --data '{"order_id": "o-17"}'

The result goes to standard output as JSON. A task that failed ends with exit code 1.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.add_argument("--target", required=True, metavar="SPIFFE_ID", help="the agent to ask")
    parser.add_argument("--capability", required=True, metavar="NAME", help="what to ask it for")
    parser.add_argument(
        "--data", default="{}", metavar="JSON", help="the arguments: JSON, @file, or - for standard input"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="for everything; default: the configuration's"
    )
    parser.add_argument("--principal", metavar="JSON", help='for whom: {"iss": "...", "sub": "..."}')
    parser.add_argument(
        "--scope",
        action="append",
        metavar="SPIFFE_ID#CAPABILITY",
        help="what the call and all that follows from it may reach; may be repeated",
    )
    parser.add_argument("--safe", action="store_true", help="running it twice does no harm: retry if lost")
    parser.add_argument("--json", action="store_true", help="as JSON also in a terminal (it always is)")
    add_identity_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make the call and print its result."""
    scope = parse_scope(options.scope)
    config = find_client_config(options)
    data = parse_json(read_text(options.data), "--data")
    principal = parse_principal(options.principal)
    try:
        result = asyncio.run(
            call_once(
                config,
                options.target,
                options.capability,
                data,
                timeout=config.bus.call_timeout if options.timeout is None else options.timeout,
                principal=principal,
                scope=scope,
                safe=options.safe,
            )
        )
    except AgentCallError as error:
        if (meant := misspelt(error, config, options.target, options.capability, "call")) is not None:
            message(escape_line(f"agentweave: {meant}"))
        raise
    print_result(result.to_json(full=True), json_wanted=True)
    if result.status == "failed":
        message(escape_line(f"agentweave: the task failed: {result.error}"))
        return ExitCode.FAILED
    return ExitCode.DONE


async def call_once(
    config: AgentConfig, target: str, capability: str, payload: Any, **options: Any
) -> TaskResult:
    """Connect, call and disconnect; arguments and errors as of ``AgentWeaveClient.call``."""
    try:
        async with AgentWeaveClient(config) as client:
            return await client.call(target, capability, payload, **options)
    except BaseExceptionGroup as group:
        raise single_error(group) from group
