"""What commands print: results on standard output, everything else on standard error.

A result is JSON when it goes into a pipe or a file or when ``--json`` asks for it, and made for people in a
terminal. Messages are for people always. Whatever strangers wrote is escaped on its way out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from agentweave_bus.observability.printable import escape_json, escape_line, escape_text

__all__ = ["as_json", "counted", "message", "print_result", "show_line", "table", "wants_json"]


def wants_json(asked_for: bool) -> bool:
    """Say whether results are to be JSON: ``--json`` was given, or nobody looks at a terminal."""
    return asked_for or not sys.stdout.isatty()


def print_result(value: Any, text: str | None = None, *, json_wanted: bool) -> None:
    """Print a result: ``value`` as JSON, or ``text`` for people (JSON where there is none)."""
    print(as_json(value) if text is None or wants_json(json_wanted) else escape_text(text))


def as_json(value: Any) -> str:
    """Write a JSON value as people can still read it."""
    return escape_json(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def message(text: str) -> None:
    """Print a message for people on standard error."""
    _tell(f"{escape_text(text)}\n")


def show_line(worker: str, width: int, line: str) -> None:
    """Show what a worker has written, behind its name in ``width`` columns; strangers may have sent it."""
    told = "\t".join(map(escape_line, line.split("\t")))
    _tell(f"{worker.ljust(width)} | {told}\n")


def _tell(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        # Whoever read it has left. What a command holds must not fall by that, nor its handling of signals.
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())


def counted(number: int, one: str, many: str = "") -> str:
    """Return ``number`` with its noun: ``1 agent``, ``2 agents``."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def table(rows: Iterable[Sequence[str]], *, indent: str = "  ") -> str:
    """Return rows as aligned columns."""
    listed = [tuple(escape_line(cell) for cell in row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*listed, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in listed)
    return "\n".join(indent + line.rstrip() for line in lines)
