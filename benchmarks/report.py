"""What a run prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks.load import Sample
from benchmarks.results import Figure, Rounds, RowFigures, figures_of, ratio
from benchmarks.rows import ROWS

__all__ = ["table", "text_report"]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown whose columns are also straight in a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        padded = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *(line(one) for one in lines)])


def _spread(figure: Figure, form: str = ",.0f") -> str:
    return f"{figure.median:{form}} ({figure.low:{form}}-{figure.high:{form}})"


_TITLES = {row.name: row.title for row in ROWS}


def text_report(found: Mapping[str, Rounds]) -> str:
    """Return the tables of a run: the figures of each row, then its ratios to the others."""
    figures = {name: figures_of(rounds) for name, rounds in found.items()}
    head = ["median (least-greatest)", "p50 µs", "p99 µs", "64 in flight /s", "256 in flight /s",
            "worker CPU µs", "client CPU µs", "broker CPU µs", "worker MB"]
    lines = [[_TITLES[name], *_cells(one)] for name, one in figures.items()]
    parts = [table(head, lines)]
    for base in ("raw", "faststream", "a2a"):
        if base in found:
            parts.append(table([f"ratio to {_TITLES[base]}", "p50", "p99", "64 in flight", "256 in flight"],
                               list(_ratios(found, base))))
    return "\n\n".join(parts)


def _cells(one: RowFigures) -> Iterator[str]:
    for figure in (one.p50, one.p99, one.at_64, one.at_256, one.worker_cpu, one.client_cpu):
        yield _spread(figure)
    yield "" if one.broker_cpu is None else _spread(one.broker_cpu)
    yield f"{one.memory.median:.0f}"


_MEASURES: Sequence[Callable[[Mapping[int, Sample]], float]] = (
    lambda one: one[1].p50_us,
    lambda one: one[1].p99_us,
    lambda one: one[64].per_second,
    lambda one: one[256].per_second,
)


def _ratios(found: Mapping[str, Rounds], base: str) -> Iterator[list[str]]:
    for name, rounds in found.items():
        if name != base:
            yield [_TITLES[name],
                   *(_spread(ratio(rounds, found[base], value), ".2f") for value in _MEASURES)]
