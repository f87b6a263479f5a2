"""What a run found, as tables: in Markdown, with columns that are straight in a terminal, too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from benchmarks.load import Sample
from benchmarks.results import Figure, Rounds, RowFigures, StageFigure, figures_of, ratio
from benchmarks.rows import ROWS
from benchmarks.targets import Verdict, judge

__all__ = [
    "TITLES",
    "failures_list",
    "figures_table",
    "machine_line",
    "ratios_tables",
    "spread",
    "stages_table",
    "table",
    "targets_table",
    "verdicts_table",
]

TITLES = {row.name: row.title for row in ROWS}
_BASES = ("raw", "faststream", "a2a")


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table: the first column is text, the others are figures."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        padded = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *(line(one) for one in lines)])


def machine_line(machine: Mapping[str, str]) -> str:
    """Return the machine and the versions as one paragraph."""
    return "; ".join(f"{name}: {value}" for name, value in machine.items()) + "."


def figures_table(found: Mapping[str, Rounds]) -> str:
    """Return the figures of each row: the median of the rounds, and the least and the greatest."""
    head = [
        "median (least to greatest round)",
        "p50 µs",
        "p99 µs",
        "64 in flight, /s",
        "256 in flight, /s",
        "worker CPU µs",
        "client CPU µs",
        "broker CPU µs",
        "worker MB",
    ]
    return table(head, [[TITLES[name], *_cells(figures_of(rounds))] for name, rounds in found.items()])


def _cells(one: RowFigures) -> Iterator[str]:
    for figure in (one.p50, one.p99, one.at_64, one.at_256, one.worker_cpu, one.client_cpu):
        yield spread(figure)
    yield "" if one.broker_cpu is None else spread(one.broker_cpu)
    yield spread(one.memory)


def failures_list(found: Mapping[str, Rounds]) -> str:
    """Return a line for each row and load with calls that failed; empty when none did."""
    lines = []
    for name, rounds in found.items():
        for tasks in rounds[0]:
            failed = sum(one[tasks].failed for one in rounds)
            if failed:
                made = failed + sum(one[tasks].calls for one in rounds)
                why = next(one[tasks].failure for one in rounds if one[tasks].failed)
                lines.append(
                    f"- {TITLES[name]}, {tasks} in flight: {failed:,} of {made:,} failed ({why:.200})"
                )
    return "\n".join(["Calls that failed, and are in no other figure:", "", *lines]) if lines else ""


def spread(figure: Figure, form: str = ",.0f") -> str:
    """Return a median with the least and the greatest round."""
    return f"{figure.median:{form}} ({figure.low:{form}} to {figure.high:{form}})"


_MEASURES: Mapping[str, Callable[[Mapping[int, Sample]], float]] = {
    "p50": lambda one: one[1].p50_us,
    "p99": lambda one: one[1].p99_us,
    "64 in flight": lambda one: one[64].per_second,
    "256 in flight": lambda one: one[256].per_second,
    "CPU of all": lambda one: sum(one[64].cpu_us.values()),
    "CPU of the worker": lambda one: one[64].cpu_us["worker"],
    "memory of the worker": lambda one: float(one[64].resident["worker"]),
}


def ratios_tables(found: Mapping[str, Rounds]) -> Iterator[str]:
    """Return a table for each row that others are compared with: the median of the rounds' own ratios."""
    for base in _BASES:
        if base in found and len(found) > 1:
            lines = [
                [TITLES[name], *(spread(ratio(rounds, found[base], m), ".2f") for m in _MEASURES.values())]
                for name, rounds in found.items()
                if name != base
            ]
            yield table([f"times {TITLES[base]}", *_MEASURES], lines)


def targets_table(found: Mapping[str, Rounds]) -> str:
    """Return the targets and whether they are met; empty without the rows for any."""
    return verdicts_table(judge(found))


def verdicts_table(verdicts: Iterable[Verdict]) -> str:
    """Return what was wanted and what was found; empty where nothing was."""
    lines = [
        [verdict.wanted, spread(verdict.found, ".2f"), "met" if verdict.met else "NOT met"]
        for verdict in verdicts
    ]
    return table(["target", "found", ""], lines) if lines else ""


def stages_table(stages: Sequence[StageFigure]) -> str:
    """Return what each stage of a call costs, in microseconds; empty cells where batching changes nothing."""
    lines = [
        [one.name, spread(one.alone, ".1f"), "" if one.of_16 is None else spread(one.of_16, ".1f")]
        for one in stages
    ]
    return table(["stage, µs a call", "alone", "16 at a time"], lines)
