"""Finding and reading audit records: the logs of a directory, as they lie there.

For looking, not for proof: nothing is verified here (``agentweave audit verify`` does that).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agentweave_bus.cli.client_config import STATE_DIR
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.observability.printable import escape_line

__all__ = ["audit_paths", "describe", "log_files", "matching", "on_behalf_of", "records_of"]

Record = dict[str, Any]


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
    """Read a file's records; lines that are none are left out. Each record gets ``log``, its file's stem."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        yield from parsed(lines, file)


def parsed(lines: Iterable[str], file: Path) -> Iterator[Record]:
    """Read the records of lines."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield {"log": file.name.split(".")[0], **record}


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
    moment = datetime.fromtimestamp(record.get("ts", 0) / 1000, UTC).strftime("%H:%M:%S.%f")[:-3]
    return escape_line(f"{moment}  {record['log']:<12} {_event(record)}")


def _event(record: Record) -> str:
    event = record.get("event")
    caller, callee = record.get("caller") or record.get("iss"), record.get("callee") or record.get("aud")
    who = (
        f"{caller} -> {callee} {record.get('action') or record.get('cap')}" if caller else "an unknown sender"
    )
    match event:
        case "call":
            return f"sent      {who}: {record.get('reason')}"
        case "admission":
            return f"admitted  {who}: {record.get('reason')}"
        case "refusal":
            return f"REFUSED   {who} at {record.get('step_name')}: {record.get('reason')}"
        case "outcome":
            return f"outcome   {record.get('status')} after {record.get('ms')} ms"
        case "start":
            return f"start     {record.get('instance')}"
        case _:
            return str(event)
