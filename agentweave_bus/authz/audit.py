"""The audit log: append-only JSON Lines in which every record carries the hash of the line before.

One *chain* per process instance. ``append`` returns when the operating system has the line, ``record``
does so with one write for all that is recorded in the same turn of the event loop; a thread of the log's
own then makes it safe on disk (``fsync``), and :meth:`AuditLog.witness` tells how far that
has come, so that peers can note it in their own logs and nobody can cut or replace this one unseen.

Files lie beside each other: for ``/var/log/shop/order.log`` they are called
``order.<UTC start>.<chain>.<number>.jsonl``. A new file goes on with the same chain; a new process
begins a new chain, whose first record names where each earlier one in the directory ended.

``docs/audit.md`` describes the records. Checking them is :mod:`agentweave_bus.authz.audit_report`.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import anyio.to_thread

from agentweave_bus.authz.audit_format import (
    FIRST_PREV,
    RESERVED_KEYS,
    VERSION,
    LogName,
    chain_tails,
    encode_record,
    line_hash,
)
from agentweave_bus.authz.frames import DEFAULT_MAX_BYTES, DEFAULT_RETENTION_S, FrameStore
from agentweave_bus.authz.redaction import Redaction
from agentweave_bus.exceptions import AuditError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = ["AuditEntry", "AuditLog", "LogWitness"]

DEFAULT_MAX_FILE_BYTES: Final = 64 * 1024 * 1024
SYNC_INTERVAL_S: Final = 0.05
"""A crash of the machine (not of the process) can lose the records of about this time (seconds)."""
CLOSE_TIMEOUT_S: Final = 30.0


class AuditEntry(NamedTuple):
    """One record that the operating system has. ``hash`` is SHA-256 of its line."""

    audit_id: str
    seq: int
    hash: bytes


class LogWitness(NamedTuple):
    """How far a log is safely on disk: what a peer notes about it. ``hash`` is of record ``seq``."""

    chain: str
    seq: int
    hash: bytes


_Queued: TypeAlias = "tuple[bytes, asyncio.Future[None] | None, Callable[[AuditError], None] | None]"
"""A line that is in the chain and not written yet, and who is told what became of it."""


class AuditLog:
    """Writes one chain. Opened by its constructor, closed by :meth:`aclose`. Any thread may append.

    Args:
        path: names the log; files are written beside it (see the module's description). A directory
            gets files called ``audit...``.
        instance: names this process in the chain's first record, such as its SPIFFE ID and replica.
        redact: field names (``card_number``, at any depth) or dotted paths from the payload
            (``customer.name``) whose values are not written.
        max_file_bytes: a file that has reached this is followed by a new one.
        max_frames_bytes: for the frames kept by digest; 0 keeps none.
        frame_retention_s: how long frames stay (seconds).
        clock_ms: milliseconds since the epoch.

    Raises:
        AuditError: the directory can't be made or written.

    """

    def __init__(
        self,
        path: str | Path,
        instance: str,
        *,
        redact: Iterable[str] = (),
        max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
        max_frames_bytes: int = DEFAULT_MAX_BYTES,
        frame_retention_s: float = DEFAULT_RETENTION_S,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.chain: Final = os.urandom(16).hex()
        self._name = LogName.of(path)
        self._redaction = Redaction(redact)
        self._max_file_bytes = max_file_bytes
        self._clock_ms = clock_ms
        self._lock = threading.RLock()
        self._seq, self._hash = -1, FIRST_PREV
        self._written = self._seq, self._hash
        self._queued: list[_Queued] = []
        self._queued_bytes = 0
        self._queued_frames: list[tuple[bytes, bytes]] = []
        self._settled: list[tuple[list[_Queued], AuditError | None]] = []
        self._settling_on: asyncio.AbstractEventLoop | None = None
        self._fd, self._size, self._number = -1, 0, 0
        self._retired: list[int] = []
        self._refusal = ""
        self._witness: LogWitness | None = None
        self._directory_changed = False
        self._dirty = threading.Event()
        self._closing = threading.Event()
        self._start = datetime.fromtimestamp(clock_ms() / 1000, UTC).strftime("%Y%m%dT%H%M%SZ")
        self._open(instance)
        self._frames = FrameStore(
            self._name.directory,
            self._name.stem,
            self.chain,
            max_bytes=max_frames_bytes,
            retention_s=frame_retention_s,
            clock_ms=clock_ms,
        )
        self._syncer = threading.Thread(target=self._sync_until_closed, name="audit-sync", daemon=True)
        self._syncer.start()

    @property
    def file(self) -> Path:
        """The file being written."""
        return self._name.file(self._start, self.chain, self._number)

    def append(self, record: Mapping[str, Any]) -> AuditEntry:
        """Write a record and return its id. The operating system has it when this returns.

        ``record`` is a JSON object (a ``Decimal`` stands for a number) without the keys that the log
        itself writes; its ``input`` is redacted as configured.

        Raises:
            AuditError: it can't be written. Nothing may happen that was to be recorded by it.

        """
        body = self._body(record)
        with self._lock:
            self._write_queued()
            if self._size >= self._max_file_bytes:
                self._rotate()
            return self._append(body)

    async def record(
        self, record: Mapping[str, Any], *, frame: tuple[bytes, bytes] | None = None
    ) -> AuditEntry:
        """Do what :meth:`append` does, in one write with all that is recorded in this turn of the loop.

        ``frame`` is a digest and a frame to be kept as by :meth:`keep_frame`, before the record is written.

        Raises:
            AuditError: it can't be written. Nothing may happen that was to be recorded by it.

        """
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = self._queue(self._body(record), waiter, None, frame)
        await waiter
        return entry

    async def record_all(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Do as :meth:`record` for several records, in one write.

        Raises:
            AuditError: one of them can't be written. Nothing may happen that was to be recorded by any.

        """
        bodies = [self._body(record) for record in records]
        loop = asyncio.get_running_loop()
        waiters: list[asyncio.Future[None]] = []
        try:
            for body in bodies:
                waiter: asyncio.Future[None] = loop.create_future()
                self._queue(body, waiter, None)
                waiters.append(waiter)
            for waiter in waiters:
                await waiter
        finally:
            for waiter in waiters:
                if not waiter.cancel() and not waiter.cancelled():
                    waiter.exception()  # now it counts as seen

    def record_soon(self, record: Mapping[str, Any], on_failure: Callable[[AuditError], None]) -> None:
        """Record what has happened already, in the same write; ``on_failure`` hears if that fails.

        Raises:
            AuditError: it can't even be queued.

        """
        self._queue(self._body(record), None, on_failure)

    def keep_frame(self, digest: bytes, frame: bytes) -> None:
        """Keep a whole frame under the digest of its head, within the bounds configured.

        Raises:
            AuditError: it can't be written.

        """
        self._frames.keep(digest, frame)

    def find_frame(self, digest: bytes) -> bytes | None:
        """Return the frame kept under ``digest``, or None. Reads files: not for the event loop."""
        return self._frames.find(digest)

    def witness(self) -> LogWitness | None:
        """Return the last record that is safely on disk; None before there is one."""
        return self._witness

    async def aclose(self) -> None:
        """Write the closing record, make everything safe on disk and close. Harmless when repeated.

        Raises:
            AuditError: the end can't be written or made safe.

        """
        await anyio.to_thread.run_sync(self.close)

    def close(self) -> None:
        """Do what :meth:`aclose` does, blocking."""
        if self._closing.is_set():
            return
        try:
            self.append({"event": "end"})
        finally:
            self._closing.set()
            self._dirty.set()
            self._syncer.join(CLOSE_TIMEOUT_S)
            with self._lock:
                self._write_queued()
                broken, self._refusal = self._refusal, self._refusal or "it is closed"
                os.close(self._fd)
            self._frames.close()
        if broken:
            raise AuditError(f"the audit log can't be written: {broken}")

    # --- files -----------------------------------------------------------------------------------------

    def _open(self, instance: str) -> None:
        try:
            self._name.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            earlier = [tail.to_json() for tail in chain_tails(self._name)]
            self._next_file()
        except OSError as problem:
            raise AuditError(f"{self._name.directory}: no audit log can be written: {problem}") from problem
        first = {"event": "start", "version": VERSION, "chain": self.chain, "instance": instance}
        self._append(encode_record({**first, "previous": earlier}))

    def _rotate(self) -> None:
        ended = {"file": self.file.name, "chain": self.chain, "seq": self._seq, "hash": self._hash.hex()}
        retired = self._fd
        try:
            self._next_file()
        except OSError as problem:
            raise AuditError(f"the audit log's next file can't be made: {problem}") from problem
        self._retired.append(retired)
        self._append(encode_record({"event": "rotate", "version": VERSION, "previous": [ended]}))

    def _next_file(self) -> None:
        path = self._name.file(self._start, self.chain, self._number + 1)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags, 0o600)
        self._number, self._size, self._directory_changed = self._number + 1, 0, True

    # --- records ---------------------------------------------------------------------------------------

    def _body(self, record: Mapping[str, Any]) -> bytes:
        if not RESERVED_KEYS.isdisjoint(record):
            raise AuditError(f"{', '.join(sorted(RESERVED_KEYS))} are written by the log itself")
        if self._redaction and isinstance(record.get("input"), dict):
            cleaned = self._redaction.apply(record["input"])
            if cleaned is not record["input"]:
                record = {**record, "input": cleaned}
        return encode_record(record)

    def _append(self, body: bytes) -> AuditEntry:
        entry, line = self._next(body)
        self._write(line)
        self._advance(entry)
        self._written = self._seq, self._hash
        return entry

    def _next(self, body: bytes) -> tuple[AuditEntry, bytes]:
        """Return the chain's next record and its line, with the line break."""
        if self._refusal:
            raise AuditError(f"the audit log can't be written: {self._refusal}")
        seq = self._seq + 1
        audit_id = f"{self.chain}-{seq}"
        front = f'{{"audit_id":"{audit_id}","ts":{self._clock_ms()},"seq":{seq},"prev":"{self._hash.hex()}"'
        line = front.encode() + (b"}" if body == b"{}" else b"," + body[1:])
        return AuditEntry(audit_id, seq, line_hash(line)), line + b"\n"

    def _advance(self, entry: AuditEntry) -> None:
        self._seq, self._hash = entry.seq, entry.hash

    # --- one write for a turn of the loop ----------------------------------------------------------------

    def _queue(
        self,
        body: bytes,
        waiter: asyncio.Future[None] | None,
        on_failure: Callable[[AuditError], None] | None,
        frame: tuple[bytes, bytes] | None = None,
    ) -> AuditEntry:
        with self._lock:
            if self._size + self._queued_bytes >= self._max_file_bytes:
                self._write_queued()
                self._rotate()
            entry, line = self._next(body)
            self._advance(entry)
            self._queued.append((line, waiter, on_failure))
            self._queued_bytes += len(line)
            if frame is not None:
                self._queued_frames.append(frame)
            self._settle_soon()
        return entry

    def _settle_soon(self) -> None:
        loop = asyncio.get_running_loop()
        if self._settling_on is not loop:
            self._settling_on = loop
            loop.call_soon(self._settle)

    def _settle(self) -> None:
        """Write what is queued, and tell all who wait."""
        with self._lock:
            self._settling_on = None
            self._write_queued()
            settled, self._settled = self._settled, []
        for queued, error in settled:
            for _, waiter, on_failure in queued:
                _tell(waiter, on_failure, error)

    def _write_queued(self) -> None:
        """Write what is queued. Who waits is told by :meth:`_settle`, on the loop that they wait on.

        When it fails, none of it was recorded, and the chain goes on from what was written last.
        """
        queued, self._queued = self._queued, []
        frames, self._queued_frames = self._queued_frames, []
        if not queued:
            return
        self._queued_bytes, error = 0, None
        try:
            if frames:
                self._frames.keep_all(frames)
            self._write(b"".join([line for line, _, _ in queued]))
            self._written = self._seq, self._hash
        except AuditError as problem:
            error = problem
            self._seq, self._hash = self._written
        self._settled.append((queued, error))

    def _write(self, line: bytes) -> None:
        try:
            written = os.write(self._fd, line)
        except OSError as problem:
            raise AuditError(f"the audit log can't be written: {problem.strerror}") from problem
        if written != len(line):
            self._take_back(written)
            raise AuditError("the audit log can't be written: the disk is full")
        self._size += written
        if not self._dirty.is_set():
            self._dirty.set()

    def _take_back(self, written: int) -> None:
        """Remove half a line. If even that fails, nothing more may follow it."""
        try:
            os.ftruncate(self._fd, self._size)
        except OSError as problem:
            self._refusal = f"{written} bytes of a record could not be taken back: {problem.strerror}"

    # --- on disk ---------------------------------------------------------------------------------------

    def _sync_until_closed(self) -> None:
        while not self._closing.is_set():
            self._dirty.wait()
            self._dirty.clear()
            self._sync()
            self._closing.wait(SYNC_INTERVAL_S)
        self._sync()

    def _sync(self) -> None:
        with self._lock:
            retired, self._retired = self._retired, []
            directory_changed, self._directory_changed = self._directory_changed, False
            current, reached = self._fd, LogWitness(self.chain, *self._written)
        try:
            for fd in retired:
                os.fsync(fd)
                os.close(fd)
            os.fsync(current)
            if directory_changed:
                _sync_directory(self._name.directory)
        except OSError as problem:  # what the disk has is unknown from here on: fail closed
            with self._lock:
                self._refusal = f"fsync failed: {problem.strerror}"
        else:
            self._witness = reached


def _tell(
    waiter: asyncio.Future[None] | None,
    on_failure: Callable[[AuditError], None] | None,
    error: AuditError | None,
) -> None:
    """Tell who waits for a record, or who only wants to hear of a failure, what became of it."""
    if waiter is not None:
        if waiter.done():  # cancelled: nobody waits any more
            return
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(AuditError(str(error)))
    elif error is not None and on_failure is not None:
        on_failure(error)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
