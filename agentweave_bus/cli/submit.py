"""``agentweave submit``: a durable task, and its reference; with ``--wait`` its result."""

from __future__ import annotations

import argparse
import asyncio
from contextlib import suppress
from datetime import datetime
from typing import Any, Final

from agentweave_bus.cli.arguments import parse_json, parse_principal, parse_scope, read_text
from agentweave_bus.cli.client_config import add_identity_arguments, find_client_config
from agentweave_bus.cli.exit_codes import ExitCode, single_error
from agentweave_bus.cli.output import message, print_result
from agentweave_bus.cli.stack_agents import misspelt
from agentweave_bus.cli.task_drawing import schedule_in_words
from agentweave_bus.config import AgentConfig
from agentweave_bus.exceptions import AgentCallError, ConfigurationError
from agentweave_bus.observability.printable import escape_line
from agentweave_bus.runtime import AgentWeaveClient
from agentweave_bus.types import TaskResult

__all__ = ["add_arguments", "run"]

_EPILOG: Final = """\
Example:
  agentweave submit --target spiffe://shop.test/agent/order --capability create_order \\
      --data @order.json --idempotency-key order-17
  agentweave submit --target spiffe://shop.test/agent/order --capability create_order \\
      --data @order.json --wait

It is stored when this returns, and its reference is printed: `agentweave task watch REFERENCE`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.add_argument("--target", required=True, metavar="SPIFFE_ID", help="the agent that it is for")
    parser.add_argument("--capability", required=True, metavar="NAME", help="what to ask it for")
    parser.add_argument(
        "--data", default="{}", metavar="JSON", help="the arguments: JSON, @file, or - for standard input"
    )
    parser.add_argument(
        "--idempotency-key", metavar="TEXT", help="tasks with one key are one task, whose outcome all have"
    )
    parser.add_argument(
        "--deadline", type=float, metavar="SECONDS", help="begin it so long after it is due (default: a day)"
    )
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--delay", type=float, metavar="SECONDS", help="when it is due; at most in 31 days")
    when.add_argument(
        "--at", type=datetime.fromisoformat, metavar="TIME", help="the same as a time: 2026-05-01T09:00+02:00"
    )
    parser.add_argument(
        "--every", metavar="PERIOD", help='when it comes again: 30s, 1h, or cron in UTC: "*/15 8-17 * * 1-5"'
    )
    parser.add_argument(
        "--priority", type=int, metavar="0-9", help="7 to 9 go before others, 0 to 3 behind them"
    )
    parser.add_argument("--wait", action="store_true", help="wait for the result and print that")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="with --wait: for the result; default: for ever"
    )
    parser.add_argument("--principal", metavar="JSON", help='for whom: {"iss": "...", "sub": "..."}')
    parser.add_argument(
        "--scope",
        action="append",
        metavar="SPIFFE_ID#CAPABILITY",
        help="what the task and all that follows from it may reach; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="as JSON also in a terminal")
    add_identity_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Submit the task and print what names it, or its result."""
    if options.timeout is not None and not options.wait:
        raise ConfigurationError("--timeout is for --wait.", key="--timeout", hint="Say both, or neither.")
    scope = parse_scope(options.scope)
    config = find_client_config(options)
    data = parse_json(read_text(options.data), "--data")
    task_options: dict[str, Any] = {
        "idempotency_key": options.idempotency_key,
        "deadline": options.deadline,
        "delay": options.delay,
        "at": options.at,
        "every": options.every,
        "priority": options.priority,
        "principal": parse_principal(options.principal),
        "scope": scope,
    }
    try:
        result = asyncio.run(_submit(config, options, data, task_options))
    except AgentCallError as error:
        if (meant := misspelt(error, config, options.target, options.capability, "task")) is not None:
            message(escape_line(f"agentweave: {meant}"))
        raise
    if result is None:
        return ExitCode.DONE
    print_result(result.to_json(full=True), json_wanted=True)
    if result.status == "failed":
        message(escape_line(f"agentweave: the task failed: {result.error}"))
        return ExitCode.FAILED
    return ExitCode.DONE


def _is_for_later(options: argparse.Namespace) -> bool:
    return any(one is not None for one in (options.delay, options.at, options.every))


async def _submit(
    config: AgentConfig, options: argparse.Namespace, data: Any, task_options: dict[str, Any]
) -> TaskResult | None:
    try:
        async with AgentWeaveClient(config) as client:
            handle = await client.submit(options.target, options.capability, data, **task_options)
            if options.wait:
                # Nothing else is said meanwhile, also while it waits for the approval of others.
                message(f"agentweave: submitted {handle.full_reference}")
                return await handle.result(options.timeout)
            facts: dict[str, Any] = {
                "reference": handle.reference,
                "full_reference": handle.full_reference,
                "id": handle.id,
                "digest": handle.digest,
            }
            stored = "It is stored"
            with suppress(AgentCallError):  # then it is stored all the same
                status = await handle.status() if _is_for_later(options) else None
                if status is not None and (when := schedule_in_words(status)):
                    facts |= {"due_at": status.due_at}
                    stored += f", {when}"
            watch = f"Watch it: agentweave task watch '{handle.reference}'"
            text = f"{handle.reference}\n{escape_line(stored)}. {watch}"
            print_result(facts, text, json_wanted=options.json)
            return None
    except BaseExceptionGroup as group:
        raise single_error(group) from group
