"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from agentweave_bus.worker import run_on_fastest_loop
from benchmarks.report import text_report
from benchmarks.results import Rounds
from benchmarks.rows import ROWS, chosen
from benchmarks.run import compare


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    parser.add_argument("--rows", default=",".join(row.name for row in ROWS), help="which, by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    profile = commands.add_parser("profile", help="profile worker and client of a row")
    profile.add_argument("row")
    profile.add_argument("--tasks", type=int, default=64)
    profile.add_argument("--seconds", type=float, default=5.0)
    return parser.parse_args()


async def _compare(options: argparse.Namespace) -> None:
    found: dict[str, Rounds] = await compare(
        chosen(options.rows), rounds=options.rounds, seconds=options.seconds
    )
    print(text_report(found))


async def _profile(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        await compare(
            chosen(options.row), rounds=1, seconds=options.seconds,
            profiles=Path(folder), in_flight=(options.tasks,),
        )
        for part in ("worker", "client"):
            print(f"\n=== {part}, {options.tasks} in flight\n")
            print((Path(folder) / f"{options.row}-{part}.txt").read_text())


def main() -> None:
    """Do what the command line asks for."""
    options = _options()
    run_on_fastest_loop(_profile(options) if options.command == "profile" else _compare(options))


if __name__ == "__main__":
    main()
