"""What an identity has submitted, by its own audit log: which tasks, and the digests of their heads.

Whoever has only a task's reference finds here what its submission was, on the machine that it was made on.
It is read as it lies there, unverified: it says only what its reader did, to its reader.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from agentweave_bus.authz.audit_format import LogName
from agentweave_bus.exceptions import InvalidSpiffeIdError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.record import TaskRef
from agentweave_bus.tasks.schedule import Schedule

__all__ = ["ParkedSubmissions", "SubmittedTask", "submission_of", "submitted_tasks"]

_MARK: Final = b'"submit"'
_PARKED_MARK: Final = b'"nbf"'
_MOST_PARKED: Final = 100_000
_HASH_BYTES: Final = 32


class SubmittedTask(NamedTuple):
    """A submission: the task, the digests of its head and of its payload, and when (ms since the epoch)."""

    ref: TaskRef
    digest: bytes
    pd: bytes
    at_ms: int


def submitted_tasks(log: str | Path, me: SpiffeID, *, task_id: str = "") -> list[SubmittedTask]:
    """Return the tasks that ``me`` submitted, by the audit log ``log``; the newest last, each once.

    With ``task_id`` only those with this id. What is no such record is left out.

    Raises:
        OSError: a file can't be read.

    """
    found: dict[TaskRef, SubmittedTask] = {}
    for record in _records(log, task_id.encode()):
        task = _task(record, me)
        if task is not None and task_id in ("", task.ref.id):
            found.pop(task.ref, None)
            found[task.ref] = task
    return sorted(found.values(), key=lambda one: one.at_ms)


def submission_of(log: str | Path, ref: TaskRef) -> SubmittedTask | None:
    """Return the last submission of a task by the audit log of its sender, or ``None``. Raises OSError."""
    return next((one for one in submitted_tasks(log, ref.sender, task_id=ref.id) if one.ref == ref), None)


class ParkedSubmissions:
    """When the tasks are due that ``me`` has parked, by the audit log ``log``.

    The log is read once, and then only what was added to it: many may ask. Of 100,000 tasks the oldest are
    forgotten. Threads may share it.
    """

    def __init__(self, log: str | Path, me: SpiffeID) -> None:
        self._log = log
        self._me = me
        self._lock = threading.Lock()
        self._read: dict[Path, int] = {}  # how many bytes of each file
        self._found: OrderedDict[TaskRef, Schedule] = OrderedDict()

    def schedule_of(self, ref: TaskRef) -> Schedule | None:
        """Return when a task is due by its last submission, if that is there. Blocks; raises OSError."""
        with self._lock:
            name = LogName.of(self._log)
            for file in name.files() if name.directory.is_dir() else ():
                self._go_on(file)
            return self._found.get(ref)

    def _go_on(self, file: Path) -> None:
        with file.open("rb") as lines:
            lines.seek(self._read.get(file, 0))
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # it is being written
                self._read[file] = self._read.get(file, 0) + len(line)
                if (record := _submission(line, _PARKED_MARK)) is not None:
                    self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        task, schedule = _task(record, self._me), Schedule.read(record)
        if task is None or schedule is None:
            return
        self._found.pop(task.ref, None)
        self._found[task.ref] = schedule
        if len(self._found) > _MOST_PARKED:
            self._found.popitem(last=False)


def _records(log: str | Path, marked: bytes) -> Iterator[dict[str, Any]]:
    name = LogName.of(log)
    if not name.directory.is_dir():
        return
    for file in name.files():
        with file.open("rb") as lines:
            for line in lines:
                if (record := _submission(line, marked)) is not None:
                    yield record


def _submission(line: bytes, marked: bytes) -> dict[str, Any] | None:
    """Return the record of a submission that a line is, if it has ``marked`` in it."""
    if _MARK not in line or marked not in line:
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("event") == "submit" else None


def _task(record: dict[str, Any], me: SpiffeID) -> SubmittedTask | None:
    if record.get("iss") != me:
        return None
    try:
        agent, capability, task_id = SpiffeID(record["aud"]), record["cap"], record["id"]
        digest, pd = bytes.fromhex(record["digest"]), bytes.fromhex(record["pd"])
        at_ms = int(record["ts"])
    except (KeyError, TypeError, ValueError, OverflowError, InvalidSpiffeIdError):
        return None
    texts = isinstance(capability, str) and isinstance(task_id, str)
    if not texts or not agent.path or len(digest) != _HASH_BYTES or len(pd) != _HASH_BYTES:
        return None
    return SubmittedTask(TaskRef(agent, me, capability, task_id), digest, pd, at_ms)
