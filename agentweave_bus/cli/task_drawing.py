"""Showing tasks on a terminal: a line for what happened, a bar for how far one is, and times in words."""

from __future__ import annotations

import json
import shutil
import sys
from datetime import UTC, datetime
from typing import Final, TextIO

from agentweave_bus.observability.printable import escape_line
from agentweave_bus.tasks.events import TaskEvent
from agentweave_bus.tasks.status import TaskStatus

__all__ = ["Drawing", "moment", "pass_told", "schedule_in_words"]

_BAR: Final = 24
_MAX_SHOWN: Final = 200
_CLEAR: Final = "\r\x1b[K"


def moment(milliseconds: int) -> str:
    """Return a time, in milliseconds since the epoch, as people read it."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def schedule_in_words(status: TaskStatus) -> str:
    """Say when a task that is parked is due, and how it comes again; nothing of another one."""
    if status.every is None:
        return "" if status.due_at is None else f"due at {moment(status.due_at)}"
    if status.due_at is not None:
        return f"every {status.every}, next at {moment(status.due_at)}"
    return f"every {status.every}" if status.state.terminal else f"every {status.every}, comes no more"


class Drawing:
    """Shows events as they come. The bar stands in the last line and is drawn over."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._drawn = False

    def show(self, event: TaskEvent) -> None:
        """Show one event."""
        if event.kind == "progress" and event.fraction is not None:
            self._bar(event.fraction, event.message or "")
            return
        self._line(event.at_ms, _words(event))

    def end(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self._drawn:
            self._out.write("\n")
            self._out.flush()
            self._drawn = False

    def _line(self, at_ms: int, text: str) -> None:
        moment = datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%H:%M:%S")
        clear = _CLEAR if self._drawn else ""
        self._drawn = False
        self._out.write(f"{clear}{moment}  {escape_line(text)}\n")
        self._out.flush()

    def _bar(self, fraction: float, told: str) -> None:
        full = round(fraction * _BAR)
        text = f"[{'#' * full}{'.' * (_BAR - full)}] {fraction:4.0%}  {escape_line(told)}"
        width = shutil.get_terminal_size().columns - 1
        self._out.write(f"{_CLEAR}{text[:width].rstrip()}")
        self._out.flush()
        self._drawn = True


def _words(event: TaskEvent) -> str:
    said = f": {event.message}" if event.message else ""
    if event.kind == "artifact" and event.artifact is not None:
        name = event.artifact.get("name")
        data = json.dumps(event.artifact["data"], ensure_ascii=False, default=str)
        return f"artifact {event.artifact['type']}{f' {name}' if name else ''}: {data[:_MAX_SHOWN]}"
    if event.kind == "gap":
        return f"{event.missing} messages of progress are missing" if event.missing else "progress differs"
    if event.state is None:
        return event.kind
    if event.result is not None and event.result.error and not said:
        said = f": {event.result.error}"
    told = pass_told(event.attempt, undoing=event.undoing) if event.attempt > 1 else ""
    return f"{event.state.value}{f' ({told})' if told else ''}{said}"


def pass_told(attempt: int, *, undoing: bool) -> str:
    """Return in words which attempt it is, or that nothing is run any more but undone; of none nothing."""
    if undoing:
        return "undoing what was done"
    return f"attempt {attempt}" if attempt else ""
