"""``agentweave ping``: whether an agent is there, and whether one may ask it."""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Final

from agentweave_bus.cli.client_config import add_identity_arguments, find_client_config
from agentweave_bus.cli.exit_codes import ExitCode, single_error
from agentweave_bus.cli.output import message, print_result
from agentweave_bus.config import AgentConfig
from agentweave_bus.observability.printable import escape_line
from agentweave_bus.runtime import AgentWeaveClient
from agentweave_bus.types import TaskResult

__all__ = ["add_arguments", "run"]

_EPILOG: Final = """\
Example:
  agentweave ping spiffe://shop.test/agent/order

It calls the capability `health`, which every agent answers and which needs a grant like any other.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.add_argument("target", metavar="SPIFFE_ID", help="the agent to ask")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="default: 5")
    parser.add_argument("--json", action="store_true", help="as JSON also in a terminal")
    add_identity_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask for ``health`` and print the answer with the round-trip time."""
    config = find_client_config(options)
    result, milliseconds = asyncio.run(_ask(config, options.target, options.timeout))
    facts = {"target": options.target, "ms": round(milliseconds, 3), "health": result.data}
    print_result(facts, f"{options.target} answered in {milliseconds:.1f} ms", json_wanted=options.json)
    if result.status == "failed":
        message(escape_line(f"agentweave: it answers, but is not well: {result.error}"))
        return ExitCode.FAILED
    return ExitCode.DONE


async def _ask(config: AgentConfig, target: str, timeout: float) -> tuple[TaskResult, float]:  # noqa: ASYNC109
    try:
        async with AgentWeaveClient(config) as client:
            began = time.perf_counter()
            result = await client.call(target, "health", timeout=timeout, safe=True)
            return result, (time.perf_counter() - began) * 1000
    except BaseExceptionGroup as group:
        raise single_error(group) from group
