"""Finding and reading audit records: the logs of a directory, as they lie there.

For looking, not for proof: nothing is verified here (``agentweave audit verify`` does that). Whoever can
write a log can write nonsense into it, so what is no record by its form is said to be malformed, and
nothing is concluded from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from agentweave_bus.cli.client_config import STATE_DIR
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.observability.printable import escape_line

__all__ = ["audit_paths", "describe", "log_files", "matching", "on_behalf_of", "records_of"]

Record = dict[str, Any]

_TEXTS: Final = (
    *("event", "audit_id", "id", "digest", "decision_id", "caller", "callee", "iss", "aud"),
    *("action", "cap", "kind", "direction", "revision"),
)
_IDS: Final = ("audit_id", "id", "digest", "decision_id")
_DONE: Final = {
    "call": "sent",
    "admission": "admitted",
    "submit": "submitted",
    "publish": "published",
    "control": "told",
}
_OF_A_LOG: Final = {"malformed": ("MALFORMED", "reason"), "start": ("start", "instance")}
_OF_A_DECISION: Final = ("caller", "callee", "action")


def audit_paths(given: Iterable[str] | None) -> list[Path]:
    """Return the directories and files to read: those given, else ``.agentweave/audit`` of this directory.

    Raises:
        ConfigurationError: there are none.

    """
    paths = [Path(one) for one in given or ()] or [STATE_DIR / "audit"]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise ConfigurationError(
            f"There are no audit logs at {', '.join(missing)}.",
            hint="Name their directory; a stack's are in audit/ of its state directory.",
        )
    return paths


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
        _moment(milliseconds)
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
    found = [record for file in logs for record in records_of(file) if _led_to(record, tasks)]
    digests = {record["digest"] for record in found if "digest" in record}
    found += [
        record
        for file in logs
        for record in records_of(file)
        if record.get("digest") in digests and not _led_to(record, tasks)
    ]
    return sorted(found, key=lambda record: (record.get("ts", 0), record.get("seq", 0)))


def _led_to(record: Record, tasks: Collection[str]) -> bool:
    asked = record.get("input")
    context = asked.get("context") if isinstance(asked, dict) else None
    links = context.get("via") if isinstance(context, dict) else None
    return isinstance(links, list) and any(isinstance(one, dict) and one.get("id") in tasks for one in links)


def describe(record: Record) -> str:
    """Say in one line what a record says."""
    moment = _moment(record.get("ts", 0)).strftime("%H:%M:%S.%f")[:-3]
    return escape_line(f"{moment}  {record['log']:<12} {_event(record)}")


def _moment(milliseconds: Any) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _event(record: Record) -> str:
    event = record.get("event")
    caller, callee = record.get("caller") or record.get("iss"), record.get("callee") or record.get("aud")
    who = (
        f"{caller} -> {callee} {record.get('action') or record.get('cap')}" if caller else "an unknown sender"
    )
    match event:
        case "call" | "admission" | "submit" | "publish" | "control":
            return f"{_DONE[event]:<9} {who}: {record.get('reason')}"
        case "refusal":
            return f"REFUSED   {who} at {record.get('step_name')}: {record.get('reason')}"
        case "reissue":
            return f"reissued  {who}: attempt {record.get('attempt')}, for {record.get('operator')}"
        case "outcome":
            return f"outcome   {record.get('status')} after {record.get('ms')} ms"
        case "malformed" | "start":
            word, key = _OF_A_LOG[event]
            return f"{word:<9} {record.get(key)}"
        case _:
            return str(event)
