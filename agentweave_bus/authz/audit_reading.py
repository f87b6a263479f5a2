"""Reading audit records as they lie there: for looking, not for proof.

Nothing is verified here (:mod:`agentweave_bus.authz.audit_report` does that). Whoever can write a log can
write nonsense into it, so what is no record by its form is said to be malformed, and nothing is concluded
from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

__all__ = [
    "Record",
    "context_of",
    "led_to",
    "log_files",
    "matching",
    "moment_of",
    "on_behalf_of",
    "parsed",
    "records_of",
    "via_of",
]

Record = dict[str, Any]

_TEXTS: Final = (
    *("event", "audit_id", "id", "digest", "decision_id", "caller", "callee", "iss", "aud"),
    *("action", "cap", "kind", "direction", "revision"),
)
_IDS: Final = ("audit_id", "id", "digest", "decision_id")
_OF_A_DECISION: Final = ("caller", "callee", "action")


def log_files(paths: Iterable[Path]) -> list[Path]:
    """Return every log file of ``paths``."""
    return [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]


def records_of(file: Path) -> Iterator[Record]:
    """Read a file's records; lines that are none are left out. Each record gets ``log``, its file's stem.

    A record whose members aren't what they should be comes as one of the event ``malformed``: ``reason`` says
    what is wrong, ``record`` is what stood there, and only the ids by which it can be found are repeated.
    """
    with file.open(encoding="utf-8", errors="replace") as lines:
        yield from parsed(lines, file)


def parsed(lines: Iterable[str], file: Path) -> Iterator[Record]:
    """Read the records of lines."""
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield _in_form({"log": file.name.split(".")[0], **record}, file)


def _in_form(record: Record, file: Path) -> Record:
    fault = _fault(record)
    if fault is None:
        return record
    ids = {key: value for key in _IDS if isinstance(value := record.get(key), str)}
    log = file.name.split(".")[0]
    return {"log": log, "ts": 0, "event": "malformed", "reason": fault, **ids, "record": record}


def _fault(record: Record) -> str | None:
    """Say which member of a record is not what it should be."""
    if not isinstance(record["log"], str):
        return "its log is no text"
    if wrong := [key for key in _TEXTS if not isinstance(record.get(key, ""), str | None)]:
        return f"its {wrong[0]} is no text"
    if not _is_time(record.get("ts", 0)) or type(record.get("seq", 0)) is not int:
        return "its ts is no time, or its seq no whole number"
    if "allowed" in record and not all(isinstance(record.get(key), str) for key in _OF_A_DECISION):
        return f"a decision has {', '.join(_OF_A_DECISION)}"
    return None if _is_input(record.get("input", {})) else "its input is not what a policy is asked"


def _is_time(milliseconds: object) -> bool:
    if type(milliseconds) not in (int, float):
        return False
    try:
        moment_of(milliseconds)
    except (ValueError, OverflowError, OSError):
        return False
    return True


def _is_input(value: object) -> bool:
    context = value.get("context", {}) if isinstance(value, dict) else None
    if not isinstance(context, dict) or not isinstance(context.get("principal"), dict | None):
        return False
    via = context.get("via")
    return via is None or (isinstance(via, list) and all(map(_is_link, via)))


def _is_link(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("id", ""), str)


def matching(files: Iterable[Path], wanted: Callable[[str], bool], keys: Iterable[str]) -> list[Record]:
    """Return the records of which one of ``keys`` is wanted, in the order of their times."""
    names = tuple(keys)
    found = [
        record
        for file in files
        for record in records_of(file)
        if any(isinstance(value := record.get(name), str) and wanted(value) for name in names)
    ]
    return sorted(found, key=lambda record: (record.get("ts", 0), record.get("seq", 0)))


def on_behalf_of(files: Iterable[Path], tasks: Collection[str]) -> list[Record]:
    """Return what became of the calls that were made while one of ``tasks`` was handled, by their ids.

    A record of a decision says by ``via`` what led to its call; others go by its digest.
    """
    logs = list(files)
    found = [record for file in logs for record in records_of(file) if led_to(record, tasks)]
    digests = {record["digest"] for record in found if "digest" in record}
    found += [
        record
        for file in logs
        for record in records_of(file)
        if record.get("digest") in digests and not led_to(record, tasks)
    ]
    return sorted(found, key=lambda record: (record.get("ts", 0), record.get("seq", 0)))


def context_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the context that a policy was asked with; empty where a record has none."""
    asked = record.get("input")
    context = asked.get("context") if isinstance(asked, dict) else None
    return context if isinstance(context, dict) else {}


def via_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the requests that led to the one that a record is about, the origin first."""
    links = context_of(record).get("via")
    return [one for one in links if isinstance(one, dict)] if isinstance(links, list) else []


def led_to(record: Record, tasks: Collection[str]) -> bool:
    """Say whether one of ``tasks``, by their ids, led to the request that a record is about."""
    return any(link.get("id") in tasks for link in via_of(record))


def moment_of(milliseconds: Any) -> datetime:
    """Return the moment of a record's ``ts``, which is in milliseconds since the epoch."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
