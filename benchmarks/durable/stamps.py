"""When things happened in a worker: lines in a file, which whoever waits for them reads.

Times are of ``CLOCK_MONOTONIC`` in nanoseconds, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Final

from benchmarks.places import PAYLOAD

__all__ = ["StampReader", "StampWriter", "stamped"]

_DIGITS: Final = 20
_LOOK_S: Final = 0.002


def stamped() -> str:
    """Return the payload, as long as ever, with the time of now at its beginning."""
    return f"{time.monotonic_ns():0{_DIGITS}d}{PAYLOAD[_DIGITS:]}"


class StampWriter:
    """Appends to the file; the kernel does it whole, whoever else appends."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def since(self, text: str) -> None:
        """Write how long ago ``text`` was :func:`stamped`."""
        self._write(time.monotonic_ns() - int(text[:_DIGITS]))

    def now(self) -> None:
        """Write what time it is."""
        self._write(time.monotonic_ns())

    def _write(self, number: int) -> None:
        os.write(self._descriptor, b"%d\n" % number)


class StampReader:
    """Reads what has been written since the last time."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._seen = 0

    async def next(self, count: int, limit_s: float) -> list[int]:
        """Return the next ``count`` numbers as soon as they are there. Raises TimeoutError."""
        async with asyncio.timeout(limit_s):
            while len(found := self._numbers()) < self._seen + count:  # noqa: ASYNC110 - a file
                await asyncio.sleep(_LOOK_S)
        new = found[self._seen : self._seen + count]
        self._seen += count
        return new

    def skip(self) -> None:
        """Leave out what is there by now."""
        self._seen = len(self._numbers())

    def _numbers(self) -> list[int]:
        if not self._path.exists():
            return []
        whole, _, _begun = self._path.read_bytes().rpartition(b"\n")
        return [int(line) for line in whole.split()]
