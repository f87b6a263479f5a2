"""The picture of a run: bars from zero, with the spread of the rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from benchmarks.results import Figure, Rounds, RowFigures, figures_of
from benchmarks.rows import ROWS

__all__ = ["OTHERS", "OURS", "bars", "captioned", "draw", "picture"]

OURS: Final = "#2563a8"
OTHERS: Final = "#9aa3ad"
_DARK: Final = "#1f2933"


def draw(found: Mapping[str, Rounds], path: Path) -> None:
    """Draw latency, throughput, processor time and memory of each row into ``path`` (its ending says how).

    Needs matplotlib.
    """
    rows = [row for row in ROWS if row.name in found]
    figures = [figures_of(found[row.name]) for row in rows]
    colours = [OURS if row.peer == "bus" else OTHERS for row in rows]
    with picture(
        path,
        [row.title for row in rows],
        "1 KiB there and back; median of the rounds, whiskers from the least to the greatest round.\n"
        "Blue: this project. Grey: raw nats-py, and peers without TLS, signatures or policy.",
    ) as (first, second, third, fourth):
        _single(first, [one.p50 for one in figures], colours)
        captioned(first, "Sequential latency, p50", "µs, less is better")
        _pairs(second, figures, colours)
        captioned(second, "Throughput: 64 in flight, 256 in flight (pale)", "calls a second, more is better")
        _single(third, [one.worker_cpu for one in figures], colours)
        captioned(third, "The worker's processor time, 64 in flight", "µs a call, less is better")
        _single(fourth, [one.memory for one in figures], colours)
        captioned(fourth, "The worker's resident memory", "MB, less is better")


@contextmanager
def picture(path: Path, rows: Sequence[str], caption: str) -> Iterator[Sequence[Any]]:
    """Yield four panels, whose bars stand for ``rows``, to be filled; write them to ``path`` at the end.

    Needs matplotlib.
    """
    import matplotlib as mpl  # noqa: PLC0415 - only who draws needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    with plt.rc_context({"font.size": 9, "svg.hashsalt": "agentweave", "svg.fonttype": "none"}):
        whole, axes = plt.subplots(2, 2, figsize=(11, 7.6), sharey=True, layout="constrained")
        panels = list(axes.flat)
        yield panels
        panels[0].set_yticks(range(len(rows)), rows)
        panels[0].invert_yaxis()
        whole.suptitle(caption)
        whole.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(whole)


def _single(axes: Any, figures: Sequence[Figure], colours: Sequence[str]) -> None:
    bars(axes, range(len(figures)), figures, colours, height=0.65)


def _pairs(axes: Any, figures: Sequence[RowFigures], colours: Sequence[str]) -> None:
    places = range(len(figures))
    bars(axes, [place - 0.2 for place in places], [one.at_64 for one in figures], colours, height=0.38)
    pale = [one.at_256 for one in figures]
    bars(axes, [place + 0.2 for place in places], pale, colours, height=0.38, alpha=0.5)


def bars(
    axes: Any,
    places: Sequence[float],
    figures: Sequence[Figure],
    colours: Sequence[str],
    *,
    height: float,
    alpha: float = 1.0,
) -> None:
    """Draw a bar for each median at its place, its spread as whiskers, and the number beside it."""
    medians = [one.median for one in figures]
    below = [one.median - one.low for one in figures]
    above = [one.high - one.median for one in figures]
    axes.barh(places, medians, height=height, color=colours, alpha=alpha)
    axes.errorbar(medians, places, xerr=[below, above], fmt="none", ecolor=_DARK, elinewidth=1, capsize=2)
    for place, one in zip(places, figures, strict=True):
        axes.annotate(
            f"{one.median:,.0f}", (one.high, place), xytext=(4, 0), textcoords="offset points", va="center"
        )


def captioned(axes: Any, title: str, unit: str) -> None:
    """Say what a panel shows and in what unit; it begins at zero."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(unit)
    axes.margins(x=0.17)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _place: f"{value:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
