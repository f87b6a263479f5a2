"""Logs on the standard ``logging``: one JSON object (or one line of text) per record.

``extra=`` works as everywhere. What belongs to the request at hand (trace, task, caller) is bound
once with :func:`log_context` and appears in every record below it, across ``await``.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import IO, Any, Final, NamedTuple

from agentweave_bus.config import LoggingConfig
from agentweave_bus.observability.printable import escape_line
from agentweave_bus.observability.traceparent import TraceParent

__all__ = [
    "JsonFormatter",
    "LogContext",
    "TextFormatter",
    "configure_logging",
    "current_log_context",
    "log_context",
]

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class LogContext(NamedTuple):
    """What the records of one request have in common; None where it is not known."""

    trace_id: str | None = None
    task_id: str | None = None
    caller: str | None = None
    span_id: str | None = None

    def fields(self) -> dict[str, str]:
        """Return what is known."""
        pairs = (
            ("trace_id", self.trace_id),
            ("span_id", self.span_id),
            ("task_id", self.task_id),
            ("caller", self.caller),
        )
        return {name: value for name, value in pairs if value is not None}


_NOTHING: Final = LogContext()
_current: ContextVar[LogContext] = ContextVar("agentweave_log_context", default=_NOTHING)


def current_log_context() -> LogContext:
    """Return what is bound here."""
    return _current.get()


class log_context:  # noqa: N801 - used like a function; a class, because each call makes one
    """Bind ids to every record inside the ``with`` block; what is not given stays as it was.

    ``trace`` is a position in a trace, or a W3C traceparent; ``span`` the id of the span that is recorded
    here; ``caller`` a SPIFFE ID that has been verified.
    """

    __slots__ = ("_bound", "_token")

    def __init__(
        self,
        *,
        trace: TraceParent | str | None = None,
        span: str | None = None,
        task: str | None = None,
        caller: str | None = None,
    ) -> None:
        outer = _current.get()
        parent = TraceParent.parse(trace) if isinstance(trace, str) else trace
        self._bound = LogContext(
            outer.trace_id if parent is None else parent.trace_id,
            task or outer.task_id,
            caller or outer.caller,
            span or outer.span_id,
        )

    def __enter__(self) -> LogContext:
        self._token = _current.set(self._bound)
        return self._bound

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)


class JsonFormatter(logging.Formatter):
    """One JSON object per line; times are UTC with milliseconds."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for ``record``, without a line break."""
        entry: dict[str, Any] = {
            "time": _timestamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_current.get().fields(),
        }
        _add_extras(entry, record)
        if (trouble := _trouble(self, record)) is not None:
            entry["exception"] = trouble
        return json.dumps(_plain(entry), separators=(",", ":"))


class TextFormatter(logging.Formatter):
    """One line for people, with control characters escaped; a traceback follows, indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text for ``record``."""
        fields: dict[str, Any] = {**_current.get().fields()}
        _add_extras(fields, record)
        tail = "".join(f" {name}={value}" for name, value in fields.items())
        line = escape_line(
            f"{_timestamp(record)} {record.levelname:<7} {record.name}: {record.getMessage()}{tail}"
        )
        if (trouble := _trouble(self, record)) is None:
            return line
        return "\n".join((line, *(f"    {escape_line(each)}" for each in trouble.splitlines())))


def configure_logging(config: LoggingConfig, *, stream: IO[str] | None = None) -> Callable[[], None]:
    """Send every record of this process to ``stream`` (standard error) as ``config`` says.

    Returns a function that puts everything back. Names that start with ``agentweave`` mean this
    package's loggers, so ``agentweave.authz`` is ``agentweave_bus.authz``.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter() if config.format == "json" else TextFormatter())
    root = logging.getLogger()
    undo = [_with_handlers(root, [handler]), _with_level(root, config.level)]
    undo += [_with_level(logging.getLogger(_own_name(name)), level) for name, level in config.loggers.items()]

    def restore() -> None:
        for step in reversed(undo):
            step()

    return restore


def _own_name(name: str) -> str:
    first, dot, rest = name.partition(".")
    return f"agentweave_bus{dot}{rest}" if first == "agentweave" else name


def _with_level(logger: logging.Logger, level: str) -> Callable[[], None]:
    before = logger.level
    logger.setLevel(level)
    return lambda: logger.setLevel(before)


def _with_handlers(logger: logging.Logger, handlers: list[logging.Handler]) -> Callable[[], None]:
    before = logger.handlers[:]
    logger.handlers[:] = handlers

    def restore() -> None:
        logger.handlers[:] = before

    return restore


def _timestamp(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"


def _add_extras(fields: dict[str, Any], record: logging.LogRecord) -> None:
    """Add what ``extra`` gave; in place of a field that is there it comes beside it, unless it says the same.

    So what is known of a record can't be forged through ``extra``.
    """
    own = dict(fields)
    for name, value in vars(record).items():
        if name in _STANDARD:
            continue
        if name not in own:
            fields[name] = value
        elif not (isinstance(value, str) and value == own[name]):
            fields[f"{name}_"] = value


def _trouble(formatter: logging.Formatter, record: logging.LogRecord) -> str | None:
    parts = []
    if record.exc_info and record.exc_info[0] is not None:
        parts.append(formatter.formatException(record.exc_info))
    elif record.exc_text:
        parts.append(record.exc_text)
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts) or None


def _plain(value: Any, depth: int = 4) -> Any:
    """Return ``value`` as JSON can hold it; what JSON has no form for becomes its text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)  # NaN and infinities have no JSON form
    if isinstance(value, dict) and depth:
        return {str(key): _plain(each, depth - 1) for key, each in value.items()}
    if isinstance(value, list | tuple) and depth:
        return [_plain(each, depth - 1) for each in value]
    return str(value)
