"""The effects file: one line for each thing that a handler does, appended by every worker, never rewritten.

The kernel appends a line whole (``O_APPEND``, one ``write``), so the file's order is the order in which things
happened, whoever did them, and what a killed worker did stands there for as long as the machine runs.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Effect(NamedTuple):
    """One thing done by an attempt: ``begin``; ``end`` or ``raise``; ``ran`` a step's function, ``got`` its result, ``undid`` it."""

    line: int
    """Its place in the file."""
    at_ns: int
    pid: int
    task: str
    attempt: int
    what: str
    name: str = ""
    """Of a step, or of the capability that begins."""
    token: str = ""
    """Of a step: what its function returned; drawn anew each time that it runs."""


class EffectsWriter:
    """Appends to the effects file. One for each process."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, task: str, attempt: int, what: str, name: str = "", token: str = "") -> None:
        line = json.dumps([time.time_ns(), os.getpid(), task, attempt, what, name, token])
        os.write(self._descriptor, f"{line}\n".encode())


class EffectsReader:
    """Reads what was added since; a line that is not whole yet is left for the next time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._lines = 0

    def more(self) -> Iterator[Effect]:
        for values in json_lines(self._path, self._offset):
            self._offset, fields = values
            self._lines += 1
            yield Effect(self._lines, *fields)


def json_lines(path: Path, offset: int = 0) -> Iterator[tuple[int, Any]]:
    """Yield each whole line's value after ``offset`` bytes, with the offset behind it."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield offset, json.loads(line)


def append_json(path: Path, value: Any) -> None:
    """Append one line, whole."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, f"{json.dumps(value)}\n".encode())
    finally:
        os.close(descriptor)
