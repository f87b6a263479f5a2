"""The picture of a run: bars from zero, with the spread of the rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.results import Figure, Rounds, RowFigures, figures_of
from benchmarks.rows import ROWS

__all__ = ["bars", "draw"]

_OURS: Final = "#2563a8"
_OTHERS: Final = "#9aa3ad"
_DARK: Final = "#1f2933"


def draw(found: Mapping[str, Rounds], path: Path) -> None:
    """Draw latency, throughput, processor time and memory of each row into ``path`` (its ending says how).

    Needs matplotlib.
    """
    import matplotlib as mpl  # noqa: PLC0415 - only who draws needs it

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = [row for row in ROWS if row.name in found]
    figures = [figures_of(found[row.name]) for row in rows]
    colours = [_OURS if row.peer == "bus" else _OTHERS for row in rows]
    with plt.rc_context({"font.size": 9, "svg.hashsalt": "agentweave", "svg.fonttype": "none"}):
        picture, axes = plt.subplots(2, 2, figsize=(11, 7.6), sharey=True, layout="constrained")
        first, second, third, fourth = axes.flat
        _single(first, [one.p50 for one in figures], colours)
        _title(first, "Sequential latency, p50", "µs, less is better")
        _pairs(second, figures, colours)
        _title(second, "Throughput: 64 in flight, 256 in flight (pale)", "calls a second, more is better")
        _single(third, [one.worker_cpu for one in figures], colours)
        _title(third, "The worker's processor time, 64 in flight", "µs a call, less is better")
        _single(fourth, [one.memory for one in figures], colours)
        _title(fourth, "The worker's resident memory", "MB, less is better")
        first.set_yticks(range(len(rows)), [row.title for row in rows])
        first.invert_yaxis()
        picture.suptitle(
            "1 KiB there and back; median of the rounds, whiskers from the least to the greatest round.\n"
            "Blue: this project. Grey: raw nats-py, and peers without TLS, signatures or policy."
        )
        picture.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(picture)


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


def _title(axes: Any, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(unit)
    axes.margins(x=0.17)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _place: f"{value:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
