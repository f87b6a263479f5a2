"""Measure this project beside its peers, or one part of it: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from agentweave_bus.worker import run_on_fastest_loop
from benchmarks import documents
from benchmarks.durable.instructions import (
    TaskInstructions,
    count_task_instructions,
    task_instructions_table,
)
from benchmarks.durable.large import LongRun, large_report, measure_long_queue
from benchmarks.durable.memory import sample_task_memory
from benchmarks.durable.plot import draw_tasks
from benchmarks.durable.report import (
    cancels_line,
    task_figures_table,
    task_ratios_tables,
    task_targets_table,
)
from benchmarks.durable.results import rounds_of as task_rounds_of
from benchmarks.durable.rows import ONE, TaskRow
from benchmarks.durable.rows import USUAL as USUAL_TASKS
from benchmarks.durable.rows import chosen as chosen_tasks
from benchmarks.durable.run import compare_tasks
from benchmarks.instructions import Instructions, count_instructions, instructions_table
from benchmarks.machine import describe
from benchmarks.memory import MemorySample, memory_report, sample_memory
from benchmarks.plot import draw
from benchmarks.report import (
    failures_list,
    figures_table,
    machine_line,
    ratios_tables,
    stages_table,
    targets_table,
)
from benchmarks.results import Rounds, StageFigure, rounds_of
from benchmarks.rows import ROWS, chosen
from benchmarks.run import compare
from benchmarks.stages import measure_stages

_DEFAULT: Final = "run"
_USUAL: Final = ",".join(row.name for row in ROWS if not row.aside)
(_OURS,) = chosen_tasks("tasks")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="the comparison (what is done when no command is named)")
    run.add_argument("--rows", default=_USUAL, help="which, by commas; also: floor")
    run.add_argument("--rounds", type=int, default=5)
    run.add_argument("--seconds", type=float, default=1.6, help="of each measurement")
    run.add_argument("--no-stages", action="store_true", help="leave the stages out")
    run.add_argument("--no-tasks", action="store_true", help="leave the durable tasks out")
    run.set_defaults(act=_run)

    stages = commands.add_parser("stages", help="what each stage of a call costs")
    stages.set_defaults(act=_stages)

    memory = commands.add_parser("memory", help="a worker's memory over many calls")
    memory.add_argument("--row", default="safe")
    memory.add_argument("--calls", type=int, default=1_000_000)
    memory.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    memory.add_argument("--minutes", type=float, default=30.0, help="end after that in any case")
    memory.set_defaults(act=_memory)

    tasks = commands.add_parser("tasks", help="the comparison of durable tasks, alone")
    tasks.add_argument("--rows", default=USUAL_TASKS, help="which, by commas; also: floor")
    tasks.set_defaults(act=_tasks)

    large = commands.add_parser("large", help="whether a long queue is as quick as a short one")
    large.add_argument("--queued", type=int, default=1_000_000)
    large.add_argument("--minutes", type=float, default=20.0, help="end filling after that in any case")
    large.set_defaults(act=_large)
    for command in (run, tasks, large):
        command.add_argument("--task-rounds", type=int, default=5)
        command.add_argument("--task-seconds", type=float, default=0.7, help="of each measurement, about")

    kept = commands.add_parser("memory-tasks", help="a worker's memory over many durable tasks")
    kept.add_argument("--tasks", type=int, default=100_000)
    kept.add_argument("--every", type=float, default=3.0, help="seconds between two looks, about")
    kept.add_argument("--minutes", type=float, default=20.0, help="end after that in any case")
    kept.set_defaults(act=_memory_tasks)

    profile_tasks = commands.add_parser("profile-tasks", help="the same for a row of durable tasks")
    profile_tasks.add_argument("row")
    profile_tasks.add_argument("--seconds", type=float, default=3.0)
    profile_tasks.set_defaults(act=_profile_tasks)

    profile = commands.add_parser("profile", help="where worker and client of a row spend their time")
    profile.add_argument("row")
    profile.add_argument("--tasks", type=int, default=64)
    profile.add_argument("--seconds", type=float, default=5.0)
    profile.set_defaults(act=_profile)

    show = commands.add_parser("show", help="print (and write) the results that are in build/ again")
    show.set_defaults(act=_show)

    instructions = _add_instructions(commands.add_parser)
    for command in (run, stages, memory, tasks, large, kept, *instructions, show):
        command.add_argument("--write", action="store_true", help="update docs/benchmarks.md")
    return parser


def _add_instructions(add: Callable[..., argparse.ArgumentParser]) -> Iterator[argparse.ArgumentParser]:
    calls = add("instructions", help="how many instructions a call takes, by perf")
    calls.add_argument("--rows", default="raw,floor,safe,faststream,a2a", help="which, by commas")
    calls.add_argument("--tasks", type=int, default=64)
    calls.add_argument("--seconds", type=float, default=5.0)
    calls.set_defaults(act=_instructions)
    yield calls

    tasks = add("instructions-tasks", help="the same for a durable task")
    tasks.add_argument("--rows", default=f"{USUAL_TASKS},floor", help="which, by commas")
    tasks.add_argument("--count", type=int, default=10_000, help="how many of each row")
    tasks.set_defaults(act=_task_instructions)
    yield tasks


async def _run(options: argparse.Namespace) -> None:
    machine = describe()
    found = await compare(chosen(options.rows), rounds=options.rounds, seconds=options.seconds)
    settings = f"{options.rounds} rounds, {options.seconds:g} s for each measurement"
    rows = {name: [{n: asdict(one) for n, one in each.items()} for each in r] for name, r in found.items()}
    documents.save("comparison", {"machine": {**machine, "measured": settings}, "rows": rows})
    if not options.no_stages:
        documents.save("stages", [asdict(one) for one in await measure_stages()])
    if not options.no_tasks:
        await _compare_tasks(chosen_tasks(USUAL_TASKS), options)
    _print_comparison(options.write)
    if not options.no_stages:
        _print_stages(options.write)
    if not options.no_tasks:
        _print_tasks(options.write)


async def _tasks(options: argparse.Namespace) -> None:
    await _compare_tasks(chosen_tasks(options.rows), options)
    _print_tasks(options.write)


async def _compare_tasks(rows: Sequence[TaskRow], options: argparse.Namespace) -> None:
    machine = describe()
    rounds, seconds = options.task_rounds, options.task_seconds
    found = await compare_tasks(rows, rounds=rounds, seconds=seconds)
    settings = f"{rounds} rounds, about {seconds:g} s for each measurement"
    kept = {name: [asdict(one) for one in each] for name, each in found.items()}
    documents.save("tasks", {"machine": {**machine, "measured": settings}, "rows": kept})


async def _large(options: argparse.Namespace) -> None:
    machine = describe()
    found = await measure_long_queue(
        _OURS,
        options.queued,
        rounds=options.task_rounds,
        seconds=options.task_seconds,
        limit_s=options.minutes * 60,
    )
    documents.save("large", {"machine": machine, "found": asdict(found)})
    _print_large(options.write)


async def _stages(options: argparse.Namespace) -> None:
    documents.save("stages", [asdict(one) for one in await measure_stages()])
    _print_stages(options.write)


async def _memory(options: argparse.Namespace) -> None:
    (row,) = chosen(options.row)
    samples = await sample_memory(row, options.calls, options.every, options.minutes * 60)
    documents.save(
        "memory",
        {"machine": describe(), "wanted": options.calls, "samples": [asdict(one) for one in samples]},
    )
    _print_memory(options.write)


async def _memory_tasks(options: argparse.Namespace) -> None:
    machine = describe()
    samples = await sample_task_memory(_OURS, options.tasks, options.every, options.minutes * 60)
    kept = {"machine": machine, "wanted": options.tasks, "samples": [asdict(one) for one in samples]}
    documents.save("memory-tasks", kept)
    _print_memory_tasks(options.write)


async def _instructions(options: argparse.Namespace) -> None:
    machine = describe()
    found = await count_instructions(chosen(options.rows), tasks=options.tasks, seconds=options.seconds)
    kept = {"machine": machine, "rows": {name: asdict(one) for name, one in found.items()}}
    documents.save("instructions", kept)
    _print_instructions(options.write)


async def _task_instructions(options: argparse.Namespace) -> None:
    machine = describe()
    found = await count_task_instructions(chosen_tasks(options.rows), options.count)
    kept = {"machine": machine, "rows": {name: asdict(one) for name, one in found.items()}}
    documents.save("instructions-tasks", kept)
    _print_task_instructions(options.write)


async def _show(options: argparse.Namespace) -> None:
    kept = documents.load()
    for part, show in (
        ("comparison", _print_comparison),
        ("stages", _print_stages),
        ("memory", _print_memory),
        ("tasks", _print_tasks),
        ("large", _print_large),
        ("memory-tasks", _print_memory_tasks),
        ("instructions", _print_instructions),
        ("instructions-tasks", _print_task_instructions),
    ):
        if part in kept:
            show(options.write)


async def _profile(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        await compare(
            chosen(options.row),
            rounds=1,
            seconds=options.seconds,
            profiles=Path(folder),
            in_flight=(options.tasks,),
        )
        for part in ("worker", "client"):
            print(f"\n=== {part}, {options.tasks} in flight\n")
            print((Path(folder) / f"{options.row}-{part}.txt").read_text())


async def _profile_tasks(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = chosen_tasks(options.row)
        await compare_tasks(rows, rounds=1, seconds=options.seconds, profiles=Path(folder))
        for part in (f"worker-{ONE}-0", "client-0"):
            print(f"\n=== {part}\n")
            print((Path(folder) / f"{options.row}-{part}.txt").read_text())


def _print_comparison(write: bool) -> None:
    kept = documents.load()["comparison"]
    found: dict[str, Rounds] = rounds_of(kept["rows"])
    parts = [
        machine_line(kept["machine"]),
        figures_table(found),
        failures_list(found),
        *ratios_tables(found),
        targets_table(found),
    ]
    text = "\n\n".join(part for part in parts if part)
    _put("comparison", text, write)
    if write:
        draw(found, documents.PICTURE)


def _print_stages(write: bool) -> None:
    _put("stages", stages_table([StageFigure.from_json(one) for one in documents.load()["stages"]]), write)


def _print_memory(write: bool) -> None:
    kept = documents.load()["memory"]
    text = memory_report([MemorySample(**one) for one in kept["samples"]], kept["wanted"])
    _put("memory", f"{machine_line(kept['machine'])}\n\n{text}", write)


def _print_tasks(write: bool) -> None:
    kept = documents.load()["tasks"]
    found = task_rounds_of(kept["rows"])
    parts = [
        machine_line(kept["machine"]),
        task_figures_table(found),
        cancels_line(found),
        *task_ratios_tables(found),
        task_targets_table(found),
    ]
    if write:
        parts.insert(0, f"![Rates, latency and processor time of each row]({documents.TASKS_PICTURE.name})")
    _put("tasks", "\n\n".join(part for part in parts if part), write)
    if write:
        draw_tasks(found, documents.TASKS_PICTURE)


def _print_large(write: bool) -> None:
    kept = documents.load()["large"]
    text = large_report(LongRun.from_json(kept["found"]))
    _put("large", f"{machine_line(kept['machine'])}\n\n{text}", write)


def _print_memory_tasks(write: bool) -> None:
    kept = documents.load()["memory-tasks"]
    text = memory_report([MemorySample(**one) for one in kept["samples"]], kept["wanted"], "tasks")
    _put("memory-tasks", f"{machine_line(kept['machine'])}\n\n{text}", write)


def _print_instructions(write: bool) -> None:
    kept = documents.load()["instructions"]
    text = instructions_table({name: Instructions(**one) for name, one in kept["rows"].items()})
    _put("instructions", f"{machine_line(kept['machine'])}\n\n{text}", write)


def _print_task_instructions(write: bool) -> None:
    kept = documents.load()["instructions-tasks"]
    text = task_instructions_table({name: TaskInstructions(**one) for name, one in kept["rows"].items()})
    _put("instructions-tasks", f"{machine_line(kept['machine'])}\n\n{text}", write)


def _put(part: str, text: str, write: bool) -> None:
    print(f"{text}\n")
    if write:
        documents.write_part(part, text)


def main() -> None:
    """Do what the command line asks for."""
    arguments = sys.argv[1:]
    if not arguments or (arguments[0].startswith("--") and arguments[0] != "--help"):
        arguments = [_DEFAULT, *arguments]
    options = _parser().parse_args(arguments)
    act: Callable[[argparse.Namespace], Coroutine[Any, Any, None]] = options.act
    run_on_fastest_loop(act(options))


if __name__ == "__main__":
    main()
