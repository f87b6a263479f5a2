"""Where the audit logs of a directory are, and what a record says in one line.

For looking, not for proof: nothing is verified here (``agentweave audit verify`` does that).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from agentweave_bus.authz.audit_reading import Record, moment_of
from agentweave_bus.cli.client_config import STATE_DIR
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.observability.printable import escape_line

__all__ = ["audit_paths", "describe"]

_DONE: Final = {
    "call": "sent",
    "admission": "admitted",
    "submit": "submitted",
    "publish": "published",
    "control": "told",
    "undoing": "undone",
}
_OF_A_LOG: Final = {"malformed": ("MALFORMED", "reason"), "start": ("start", "instance")}


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


def describe(record: Record) -> str:
    """Say in one line what a record says."""
    moment = moment_of(record.get("ts", 0)).strftime("%H:%M:%S.%f")[:-3]
    return escape_line(f"{moment}  {record['log']:<12} {_event(record)}")


def _event(record: Record) -> str:
    event = record.get("event")
    caller, callee = record.get("caller") or record.get("iss"), record.get("callee") or record.get("aud")
    who = (
        f"{caller} -> {callee} {record.get('action') or record.get('cap')}" if caller else "an unknown sender"
    )
    match event:
        case "call" | "admission" | "submit" | "publish" | "control" | "undoing":
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
