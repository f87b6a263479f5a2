"""``agentweave dlq``: the dead letters of a broker, for operators: look at them, redrive them, drop them."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from agentweave_bus.cli.client_config import add_identity_arguments, find_client_config
from agentweave_bus.cli.commands import add_command
from agentweave_bus.cli.exit_codes import ExitCode, exit_code_of, message_of, single_error
from agentweave_bus.cli.output import message, print_result, table
from agentweave_bus.cli.task_drawing import pass_told
from agentweave_bus.exceptions import AgentCallError, AgentWeaveError, ConfigurationError
from agentweave_bus.observability.printable import escape_line
from agentweave_bus.runtime.operators import DeadLetterCalls, Operator
from agentweave_bus.tasks.dead_letters import LetterReference

__all__ = ["add_arguments", "run_drop", "run_list", "run_redrive", "run_show"]

T = TypeVar("T")

_LETTER: Final = f"'spiffe://shop.test/agent/order#create_order/{'5e' * 32}.3'"
_LIST_EPILOG: Final = """\
Example:
  agentweave dlq list --as operator
  agentweave dlq list --agent spiffe://shop.test/agent/order --all --json

STATE is `waiting` for what can be redriven, `event` for an event, which its publisher may publish again,
`unverified` for what is not found genuine, `doubtful` for what its agent has not signed. What was redriven
and has begun, or was dropped, is listed with --all.
"""
_SHOW_EPILOG: Final = f"""\
Example:
  agentweave dlq show {_LETTER} --as operator
"""
_REDRIVE_EPILOG: Final = f"""\
Example:
  agentweave dlq redrive {_LETTER} --as operator

It is queued when this returns; its submitter watches it by the reference it has. Asked for twice it still
runs once. Of an event that is not to be had: its publisher publishes it again.
"""
_DROP_EPILOG: Final = f"""\
Example:
  agentweave dlq drop {_LETTER} \\
    --reason "ordered again by phone" --as operator

It stays where it is for as long as dead letters are kept, and is listed with `list --all` only.
"""
_SHOWN_REASON: Final = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the commands."""
    parser.epilog = "Example:\n  agentweave dlq list --as operator\n"
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    listing = add_command(commands, "list", "list what was given up, the oldest first", _LIST_EPILOG)
    listing.add_argument("--agent", metavar="SPIFFE_ID", help="of this agent only")
    listing.add_argument(
        "--all", action="store_true", help="also what was dropped, or redriven and has begun"
    )
    listing.add_argument(
        "--limit", type=int, default=50, metavar="COUNT", help="at most so many, 1 to 200 (default: 50)"
    )
    listing.add_argument("--after", metavar="PLACE", help="go on where an earlier list ended")
    listing.set_defaults(run=run_list)
    show = add_command(commands, "show", "show all that is known of one", _SHOW_EPILOG)
    show.add_argument("letter", metavar="LETTER", help="what `list` printed")
    show.add_argument("--payload", action="store_true", help="also what was asked for")
    show.set_defaults(run=run_show)
    redrive = add_command(commands, "redrive", "have a task that was given up begin anew", _REDRIVE_EPILOG)
    redrive.add_argument(
        "--deadline",
        type=float,
        default=86_400.0,
        metavar="SECONDS",
        help="until when it may be begun (default: 86400)",
    )
    redrive.set_defaults(run=run_redrive)
    drop = add_command(commands, "drop", "note that one is dealt with", _DROP_EPILOG)
    drop.add_argument("--reason", default="", metavar="TEXT", help="why; it stands beside it")
    drop.set_defaults(run=run_drop)
    for command in (redrive, drop):
        command.add_argument("letter", metavar="LETTER", nargs="+", help="what `list` printed")
    for command in (listing, show, redrive, drop):
        command.add_argument("--json", action="store_true", help="as JSON also in a terminal")
        add_identity_arguments(command)


def run_list(options: argparse.Namespace) -> int:
    """Print dead letters."""

    async def ask(calls: DeadLetterCalls) -> dict[str, Any]:
        return await calls.list(options.agent, limit=options.limit, after=options.after, all=options.all)

    found = _asked(options, ask)
    letters = found["letters"]
    if not letters:
        message("agentweave: no dead letter" + (" behind that place." if options.after else "."))
    rows = [("STATE", "GIVEN UP", "ATTEMPTS", "WHAT", "REASON", "LETTER")]
    rows += [
        (
            one["state"],
            _moment(one["given_up_at"]),
            str(one.get("attempts", "")),
            _what(one),
            _short(one["reason"]),
            one["letter"],
        )
        for one in letters
    ]
    print_result(found, table(rows, indent=""), json_wanted=options.json)
    if found["after"] is not None:
        message(f"agentweave: there may be more: --after '{found['after']}'")
    return ExitCode.DONE


def run_show(options: argparse.Namespace) -> int:
    """Print one dead letter."""

    async def ask(calls: DeadLetterCalls) -> dict[str, Any]:
        return await calls.show(options.letter, payload=options.payload)

    found = _asked(options, ask)
    print_result(found, _drawn(found), json_wanted=options.json)
    return ExitCode.DONE


def run_redrive(options: argparse.Namespace) -> int:
    """Redrive one or several."""

    async def redrive(calls: DeadLetterCalls, letter: str) -> dict[str, Any]:
        return await calls.redrive(letter, deadline=options.deadline)

    return _each(
        options, redrive, lambda told: f"queued again, attempt {told['attempt']}: {told['reference']}"
    )


def run_drop(options: argparse.Namespace) -> int:
    """Drop one or several."""

    async def drop(calls: DeadLetterCalls, letter: str) -> dict[str, Any]:
        return await calls.drop(letter, reason=options.reason)

    return _each(options, drop, lambda told: f"dropped: {told['letter']}")


def _each(
    options: argparse.Namespace,
    act: Callable[[DeadLetterCalls, str], Awaitable[dict[str, Any]]],
    say: Callable[[dict[str, Any]], str],
) -> int:
    """Do something with every letter that is named; the worst that happened is the exit code."""
    for letter in options.letter:
        LetterReference.parse(letter)  # before anything is connected

    async def ask(calls: DeadLetterCalls) -> tuple[list[dict[str, Any]], list[AgentWeaveError]]:
        done: list[dict[str, Any]] = []
        failed: list[AgentWeaveError] = []
        for letter in options.letter:
            try:
                done.append(await act(calls, letter))
            except (AgentCallError, ConfigurationError) as error:
                failed.append(error)
        return done, failed

    done, failed = _asked(options, ask)
    if done:
        print_result(done, "\n".join(escape_line(say(one)) for one in done), json_wanted=options.json)
    for error in failed:
        message(f"agentweave: {message_of(error)}")
    return max((exit_code_of(error) for error in failed), default=ExitCode.DONE)


def _asked(options: argparse.Namespace, ask: Callable[[DeadLetterCalls], Awaitable[T]]) -> T:
    config = find_client_config(options)

    async def asked() -> T:
        try:
            async with Operator(config) as calls:
                return await ask(calls)
        except BaseExceptionGroup as group:
            raise single_error(group) from group

    return asyncio.run(asked())


def _drawn(found: dict[str, Any]) -> str:
    rows = [("letter", found["letter"]), ("state", found["state"]), ("reason", found["reason"])]
    rows.append(("given up", _moment(found["given_up_at"])))
    if "size" in found:
        rows.append(("frame", f"{found['size']} bytes, not kept; SHA-256 {found['frame']}"))
    rows += _source(found)
    if "attempts" in found:
        rows.append(("attempts", f"{'at most ' if 'event' in found else ''}{found['attempts']}"))
    if (now := found.get("now")) is not None:
        rows.append(("now", f"{now['state']}, attempt {now['attempt']}, since {_moment(now['since'])}"))
    if "correlation_id" in found:
        rows.append(("correlation id", found["correlation_id"]))
    if "not_redrivable" in found:
        rows.append(("not redrivable", found["not_redrivable"]))
    if (dropped := found.get("dropped")) is not None:
        rows.append(("dropped", f"by {dropped['by']}, {_moment(dropped['at'])} {dropped['reason']}"))
    lines = table(rows, indent="")
    history = [
        (_moment(one["at"]), f"{one['state']} ({_pass(one)})", one.get("message", ""))
        for one in found.get("history", ())
    ]
    if history:
        lines += "\n\n" + table(history)
    if "payload" in found:
        lines += "\n\n" + json.dumps(found["payload"], indent=2, ensure_ascii=False, default=str)
    return lines


def _pass(record: dict[str, Any]) -> str:
    return pass_told(record["epoch"], undoing=record.get("undoing", False))


def _source(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if (task := found.get("task")) is not None:
        rows += [("asked for by", task["sender"]), ("task", task["id"])]
    if (event := found.get("event")) is not None:
        rows += [("event", event["name"]), ("published by", event["publisher"]), ("id", event["id"])]
        rows += [("key", event["key"])] if "key" in event else []
    return rows


def _what(found: dict[str, Any]) -> str:
    if (event := found.get("event")) is not None:
        return f"{event['name']} from {event['publisher']}"
    task = found.get("task")
    return "" if task is None else f"{task['capability']} from {task['sender']}"


def _short(reason: str) -> str:
    line = escape_line(reason)
    return line if len(line) <= _SHOWN_REASON else line[: _SHOWN_REASON - 1] + "…"


def _moment(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
