"""Whole frames, kept by the digest of their head, so that it can be shown later what was asked.

A frame is appended to a segment file as ``digest (32 bytes), milliseconds (8), length (4), frame``,
integers big-endian. Segments are bounded, and so are all of a log together: the oldest are removed for
room and by age, except those that another live process has locked. A frame proves itself (it is
signed), so segments carry no hashes of their own.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from agentweave_bus.exceptions import AuditError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

__all__ = ["FrameStore", "KeptFrame", "frames_in"]

DEFAULT_MAX_BYTES: Final = 256 * 1024 * 1024
DEFAULT_RETENTION_S: Final = 30 * 24 * 3600.0

_SEGMENTS: Final = 16
_HEADER: Final = struct.Struct(">32sQI")


class KeptFrame(NamedTuple):
    """One entry of a segment; ``end`` is where in the file it ends (bytes)."""

    digest: bytes
    kept_ms: int
    frame: bytes
    end: int


class FrameStore:
    """The frames of one log in ``directory``; this process writes segments named after ``chain``.

    Args:
        directory: where segments lie.
        stem: what the log's files begin with.
        chain: of the audit log that they belong to.
        max_bytes: of all segments of the log together. 0 keeps no frames.
        retention_s: how long a segment stays after it was last written (seconds).
        clock_ms: milliseconds since the epoch.

    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        chain: str,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        retention_s: float = DEFAULT_RETENTION_S,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._directory = directory
        self._stem = stem
        self._chain = chain
        self._max_bytes = max_bytes
        self._segment_bytes = max(1, max_bytes // _SEGMENTS)
        self._retention_s = retention_s
        self._clock_ms = clock_ms
        self._lock = threading.Lock()
        self._fd = -1
        self._size = 0
        self._number = 0
        self._closed = False

    def keep(self, digest: bytes, frame: bytes) -> None:
        """Keep ``frame`` under its head's ``digest`` (32 bytes).

        Raises:
            AuditError: it can't be written.

        """
        self.keep_all([(digest, frame)])

    def keep_all(self, frames: Sequence[tuple[bytes, bytes]]) -> None:
        """Do what :meth:`keep` does for several digests and frames, in one write where they fit into one.

        Raises:
            AuditError: they can't be written, or not all of them.

        """
        if self._max_bytes == 0:
            return
        with self._lock:
            if self._closed:
                raise AuditError("the audit log is closed; no frame can be kept")
            now_ms = self._clock_ms()
            entries = [_HEADER.pack(digest, now_ms, len(frame)) + frame for digest, frame in frames]
            together = b"".join(entries)
            try:
                for data in entries if len(together) > self._segment_bytes else (together,):
                    self._write(data)
            except OSError as problem:
                raise AuditError(f"a frame can't be kept: {problem.strerror}") from problem

    def find(self, digest: bytes) -> bytes | None:
        """Return the frame kept under ``digest``, newest first, or None. Reads the files."""
        for path in reversed(self._segments()):
            found = [kept.frame for kept in frames_in(path) if kept.digest == digest]
            if found:
                return found[-1]
        return None

    def close(self) -> None:
        """Close the open segment. Harmless when called twice."""
        with self._lock:
            self._closed = True
            self._close_segment()

    def _write(self, entry: bytes) -> None:
        if self._fd < 0 or self._size + len(entry) > self._segment_bytes:
            self._next_segment(len(entry))
        written = os.write(self._fd, entry)
        if written == len(entry):
            self._size += written
            return
        os.ftruncate(self._fd, self._size)
        raise OSError(28, "the disk is full")

    def _next_segment(self, needed: int) -> None:
        self._close_segment()
        self._prune(needed)
        self._number += 1
        path = self._directory / f"{self._stem}.{self._chain}.{self._number:04d}.frames"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._size = 0

    def _close_segment(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _prune(self, needed: int) -> None:
        """Remove segments that are too old, and the oldest until the next segment has room."""
        segments = [(path, path.stat()) for path in self._segments()]
        total = sum(status.st_size for _, status in segments) + max(needed, self._segment_bytes)
        too_old = self._clock_ms() / 1000 - self._retention_s
        for path, status in segments:
            if (status.st_mtime < too_old or total > self._max_bytes) and _remove_unlocked(path):
                total -= status.st_size

    def _segments(self) -> list[Path]:
        """Return all segments of the log, least lately written first."""
        found = []
        for path in self._directory.glob(f"{self._stem}.*.frames"):
            with suppress(FileNotFoundError):  # another process pruned it
                found.append((path.stat().st_mtime_ns, path.name, path))
        return [path for _, _, path in sorted(found)]


def _remove_unlocked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(fd)


def frames_in(path: Path) -> Iterator[KeptFrame]:
    """Read a segment up to its end, or to where no whole frame follows; nothing if it is gone."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            digest, kept_ms, length = _HEADER.unpack(header)
            frame = file.read(length)
            if len(frame) < length:
                return
            yield KeptFrame(digest, kept_ms, frame, file.tell())
