"""Reading along in the audit logs of this machine, by looking at how long their files are.

For looking, not for proof. A step reads so much and no more, and a file that was there before the console is
read from near its end.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import anyio.to_thread

from agentweave_bus.authz.audit_reading import Record, log_files, parsed
from agentweave_bus.console.model import ConsoleModel
from agentweave_bus.console.watched import Watched

__all__ = ["DecisionsFeed", "LogTail"]

_log = logging.getLogger(__name__)

_NEAR_THE_END: Final = 64 * 1024
_MOST_A_STEP: Final = 2 * 1024 * 1024
_MOST_OF_A_FILE: Final = 256 * 1024
_MOST_FILES_AT_FIRST: Final = 64
_NO_LOGS: Final = "no audit logs were named"


class LogTail:
    """What was added to the logs of some directories since the last step."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._read_to: dict[Path, int] | None = None

    def step(self) -> list[Record]:
        """Return what was added, whole lines only, in the order of their times. Raises OSError."""
        sizes = {file: size for file in log_files(self._paths) if (size := _size(file)) is not None}
        if self._read_to is None:
            self._read_to = _begin(sizes)
        self._read_to = {file: at for file, at in self._read_to.items() if file in sizes}
        found: list[Record] = []
        left = _MOST_A_STEP
        for file, size in sizes.items():
            at = self._read_to.setdefault(file, 0)
            if at > size:  # another file of that name
                at = 0
            if at < size and left > 0:
                records, read = _appended(file, at, min(_MOST_OF_A_FILE, left))
                found += records
                self._read_to[file] = at + read
                left -= read
        return sorted(found, key=lambda record: (record.get("ts", 0), record.get("seq", 0)))


class DecisionsFeed:
    """Looks each half second while somebody looks at the console."""

    def __init__(self, model: ConsoleModel, paths: Sequence[Path], watched: Watched) -> None:
        self._model = model
        self._paths = paths
        self._tail = LogTail(paths)
        self._watched = watched

    async def run(self) -> None:
        """Look until cancelled."""
        if not self._paths:
            self._model.source_failed("decisions", _NO_LOGS)
            return
        while True:
            try:
                records = await anyio.to_thread.run_sync(self._step)
            except OSError as error:
                self._model.source_failed("decisions", f"{error.filename}: {error.strerror}")
            else:
                self._model.add_decisions(records)
                self._model.source_well("decisions")
            await self._watched.pause(0.5, unwatched_s=2.0)

    def _step(self) -> list[Record]:
        for path in self._paths:
            path.stat()  # a directory that is not there is told, and not taken for an empty one
        return self._tail.step()


def _begin(sizes: dict[Path, int]) -> dict[Path, int]:
    """Return from where to read what is there already: the newest files from near their ends, others not."""
    newest = sorted(sizes, key=_changed_at, reverse=True)[:_MOST_FILES_AT_FIRST]
    return {**sizes, **{file: max(0, sizes[file] - _NEAR_THE_END) for file in newest}}


def _appended(file: Path, at: int, most: int) -> tuple[list[Record], int]:
    try:
        with file.open("rb") as stream:
            stream.seek(at)
            data = stream.read(most)
    except FileNotFoundError:
        return [], 0
    whole, newline, _torn = data.rpartition(b"\n")
    if not newline and len(data) == most:  # a line longer than that is none that the console shows
        return [], len(data)
    return list(_records(whole, file)), len(whole) + len(newline)


def _records(lines: bytes, file: Path) -> Iterator[dict[str, Any]]:
    return parsed(lines.decode(errors="replace").splitlines(), file)


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:
        return None


def _changed_at(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
