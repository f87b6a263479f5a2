"""What a worker has counted when it ends, told to its supervisor: nobody can scrape it any more.

The page of its metrics goes over the pipe compressed, in lines ``metrics`` of which each is written whole or
not at all, and after them ``counted``. Where one of them is lost nothing is taken from the others. A worker
ends once, so it has one page: unpacking is work for the supervisor, and ``counted`` is quickly repeated.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterator
from typing import Final

__all__ = ["LastPage", "lines_of"]

_PART_BYTES: Final = 3000
"""A line of so much in base64 is shorter than what a pipe takes as a whole (4,096 bytes)."""
_MOST_PARTS: Final = 15
"""What a pipe that nobody reads still takes."""
_MOST_BYTES: Final = 1024 * 1024


def lines_of(page: bytes) -> Iterator[bytes]:
    """Yield the lines that tell a page; none where it is too long."""
    if len(page) > _MOST_BYTES:
        return
    packed = zlib.compress(page)
    parts = [packed[start : start + _PART_BYTES] for start in range(0, len(packed), _PART_BYTES)]
    if len(parts) <= _MOST_PARTS:
        for number, part in enumerate(parts):
            yield b"metrics %d %s\n" % (number, base64.b64encode(part))
        yield b"counted %d\n" % len(parts)


class LastPage:
    """Puts a page together again from what follows the words of its lines."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._over = False

    def add(self, told: str) -> None:
        """Take a part; what is none, or comes out of turn, spoils the whole."""
        number, _, part = told.strip().partition(" ")
        if number != str(len(self._parts)) or len(self._parts) >= _MOST_PARTS:
            return
        try:
            self._parts.append(base64.b64decode(part, validate=True))
        except (binascii.Error, ValueError):
            return

    def whole(self, told: str) -> str | None:
        """Return the page if all of it has come, else ``None``; so whenever it is asked for again."""
        if self._over or told.strip() != str(len(self._parts)):
            return None
        self._over = True
        unpacking = zlib.decompressobj()
        try:
            page = unpacking.decompress(b"".join(self._parts), _MOST_BYTES)
            return page.decode() if unpacking.eof else None
        except (zlib.error, UnicodeDecodeError):
            return None
