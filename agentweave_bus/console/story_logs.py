"""Finding what the audit logs of this machine say of one task, and of what was asked for while it ran.

For looking, not for proof; and bounded: of each file its newest part is read, of all of them so much.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from agentweave_bus.authz.audit_reading import Record, led_to, log_files, parsed

__all__ = ["TaskLogs", "logs_of_task"]

_MOST_OF_A_FILE: Final = 8 * 1024 * 1024
_MOST_OF_ALL: Final = 64 * 1024 * 1024
_MOST_RECORDS: Final = 2_000


class TaskLogs(NamedTuple):
    """``own`` are records of the task itself, ``nested`` of what was asked for on its behalf; in no order.

    ``whole`` says that all there is was read.
    """

    own: list[Record]
    nested: list[Record]
    whole: bool


def logs_of_task(paths: Sequence[Path], task_id: str, digest: str) -> TaskLogs:
    """Return what logs say of a task, by its id and the digest of its head. Raises OSError."""
    texts, whole = _texts(log_files(paths))
    first = [record for text, file in texts for record in _about(text, file, {task_id, digest})]
    own: list[Record] = []
    others: list[Record] = []
    for one in first:
        is_own = task_id == one.get("id") or digest == one.get("digest")
        (own if is_own else others).append(one)
    nested = [one for one in others if led_to(one, {task_id})]
    digests = {one["digest"] for one in nested if isinstance(one.get("digest"), str)}
    known = {one.get("audit_id") for one in (*own, *nested)}
    if digests:  # outcomes do not repeat what led to their calls
        found = (record for text, file in texts for record in _about(text, file, digests))
        nested += [one for one in found if one.get("digest") in digests and one.get("audit_id") not in known]
    whole = whole and len(own) <= _MOST_RECORDS and len(nested) <= _MOST_RECORDS
    return TaskLogs(own[:_MOST_RECORDS], nested[:_MOST_RECORDS], whole)


def _about(text: bytes, file: Path, wanted: Collection[str]) -> Iterator[Record]:
    """Read the records that mention one of ``wanted``; most lines are not even parsed."""
    marks = [one.encode() for one in wanted if one]
    lines = (line for line in text.splitlines() if any(mark in line for mark in marks))
    return parsed((line.decode(errors="replace") for line in lines), file)


def _texts(files: Sequence[Path]) -> tuple[list[tuple[bytes, Path]], bool]:
    """Return the ends of files, of the newest first, and whether that is all of them."""
    sized = []
    for file in files:
        try:
            status = file.stat()
        except FileNotFoundError:
            continue
        sized.append((status.st_mtime, status.st_size, file))
    texts, left, whole = [], _MOST_OF_ALL, True
    for _, size, file in sorted(sized, reverse=True):
        most = min(left, _MOST_OF_A_FILE)
        whole = whole and size <= most
        with file.open("rb") as stream:
            stream.seek(max(0, size - most))
            text = stream.read(most)
        left -= len(text)
        texts.append((text, file))
    return texts, whole
