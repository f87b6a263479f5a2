"""``agentweave supervisor``: look at a running supervisor, and tell it what to do."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path
from typing import Any, Final

from agentweave_bus.cli.commands import add_command
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.cli.output import as_json, table, wants_json
from agentweave_bus.supervisor.control_socket import SOCKET_NAME, ask_supervisor

__all__ = ["add_arguments", "run"]

_STATUS_EPILOG: Final = """\
Example:
  agentweave supervisor status
  agentweave supervisor status --follow --state-dir /run/shop
"""
_RESTART_EPILOG: Final = """\
Example:
  agentweave supervisor restart
  agentweave supervisor restart order

It returns when the last one has been replaced. One whose replacement does not become ready goes on.
"""
_DRAIN_EPILOG: Final = """\
Example:
  agentweave supervisor drain order

It returns at once; `status` shows when they have ended. A worker that is drained stays down until `restart`.
"""
_RELOAD_EPILOG: Final = """\
Example:
  agentweave supervisor reload
"""
_SCALE_EPILOG: Final = """\
Example:
  agentweave supervisor scale order 3
  agentweave supervisor scale order auto

Where the file gives the agent min and max the number has to lie between them, and stays whatever the backlog;
after `auto`, or a reload, the backlog decides again.
"""
_COMMANDS: Final = (
    ("status", "show every worker: its state, process, memory and last beat", _STATUS_EPILOG),
    ("restart", "replace workers by fresh ones, one by one, with no gap in service", _RESTART_EPILOG),
    ("drain", "have workers finish what they do, end, and stay down", _DRAIN_EPILOG),
    ("reload", "read the files again and replace every worker, as SIGHUP does", _RELOAD_EPILOG),
    ("scale", "change how many workers an agent has, until the next reload", _SCALE_EPILOG),
)
_STATUS_S: Final = 5.0
_ROLL_S: Final = 3600.0
_STATE_DIR: Final = ".agentweave"
_CLEAR: Final = "\x1b[H\x1b[J"
_MEGABYTE: Final = 1024 * 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the commands."""
    parser.epilog = "Example:\n  agentweave supervisor status\n"
    commands = parser.add_subparsers(dest="do", metavar="COMMAND", required=True)
    for name, summary, epilog in _COMMANDS:
        made = add_command(commands, name, summary, epilog)
        if name == "status":
            made.add_argument("--follow", action="store_true", help="show it anew each second, until Ctrl-C")
        elif name == "scale":
            made.add_argument("agent", metavar="AGENT", help="whose workers")
            made.add_argument("replicas", metavar="COUNT", type=_count, help="how many, or auto")
        elif name != "reload":
            made.add_argument("agent", metavar="AGENT", nargs="?", help="whose workers (default: all)")
        made.add_argument(
            "--state-dir", metavar="DIR", default=_STATE_DIR, help=f"its state_dir ({_STATE_DIR})"
        )
        made.add_argument("--json", action="store_true", help="as JSON also in a terminal")
        made.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Ask, and show the answer."""
    path = Path(options.state_dir).absolute() / SOCKET_NAME
    request = {"do": options.do, "agent": getattr(options, "agent", None)}
    if options.do == "scale":
        request["replicas"] = options.replicas
    follow = options.do == "status" and options.follow
    while True:
        answer = asyncio.run(ask_supervisor(path, request, _STATUS_S if options.do == "status" else _ROLL_S))
        if wants_json(options.json):
            print(as_json(answer), flush=True)
        else:
            print((_CLEAR if follow and sys.stdout.isatty() else "") + _text(answer), flush=True)
        if not follow:
            return ExitCode.DONE
        time.sleep(1)


def _count(text: str) -> int | None:
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from None


def _text(answer: dict[str, Any]) -> str:
    agents = [one for one in answer["agents"] if one["max"] is not None or one["backlog"]]
    shown = _workers_text(answer["workers"])
    return f"{shown}\n\n{_agents_text(agents)}" if agents else shown


def _agents_text(agents: list[dict[str, Any]]) -> str:
    """Show of each agent for which tasks wait, or whose number of workers changes, why it has so many."""
    head = ("AGENT", "WORKERS", "MIN", "MAX", "BACKLOG", "WANTED", "")
    numbers = ("workers", "min", "max", "backlog", "wanted")
    rows = [
        (
            one["agent"],
            *("" if one[key] is None else str(one[key]) for key in numbers),
            "held by hand" if one["held"] else "",
        )
        for one in agents
    ]
    return table([head, *rows])


def _workers_text(workers: list[dict[str, Any]]) -> str:
    head = ("WORKER", "STATE", "PID", "UP", "RESTARTS", "IN FLIGHT", "HANDLED", "MEMORY", "LAG", "SVID", "")
    return table([head, *(_row(one) for one in workers)])


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    beat = one["beat"]
    beats = ("", "", "", "", "")
    if beat is not None:
        svid = "none" if beat["svid_s"] is None else _duration(beat["svid_s"])
        beats = (
            str(beat["in_flight"]),
            str(beat["handled"]),
            f"{beat['resident'] / _MEGABYTE:.0f} MB",
            f"{beat['lag_s'] * 1000:.0f} ms",
            svid,
        )
    up = "" if one["up_s"] is None else _duration(one["up_s"])
    lost = "not connected" if beat is not None and not beat["connected"] else ""
    pid = "" if one["pid"] is None else str(one["pid"])
    why = (one["why"].splitlines() or [""])[0]
    return (one["name"], one["state"], pid, up, str(one["restarts"]), *beats, why or lost)


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
