"""Spans as the rest of the package sees them, and which one is current here.

With tracing off there are none, but an incoming trace is still handed on, so that one agent without tracing
does not cut everybody else's trace in two. Nothing of OpenTelemetry is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Final, Literal, Protocol

from agentweave_bus.observability.logs import log_context
from agentweave_bus.observability.traceparent import TraceParent

__all__ = [
    "AttributeValue",
    "Span",
    "SpanKind",
    "SpanRecorder",
    "bound",
    "handed_on",
    "inner_span",
    "note",
    "traceparent",
]

SpanKind = Literal["internal", "server", "client", "producer", "consumer"]
AttributeValue = str | bool | int | float


class SpanRecorder(Protocol):
    """Records spans; :class:`.recording.Recorder` does."""

    def span(
        self,
        name: str,
        kind: SpanKind,
        above: TraceParent | None,
        attributes: Mapping[str, AttributeValue] | None,
        began_ns: int | None = None,
    ) -> AbstractContextManager[Span]:
        """Record a span below the position ``above`` for the block, in which it is the current one."""


class Span(Protocol):
    """What a caller may do with a span."""

    @property
    def traceparent(self) -> str | None:
        """The position to hand on; None where no trace is known."""

    @property
    def recorder(self) -> SpanRecorder | None:
        """What records it and what is below it; None where nothing is recorded, nor need be described."""

    def rename(self, name: str) -> None:
        """Give it a name that was not known when it began; few names may occur."""

    def set_attribute(self, name: str, value: AttributeValue) -> None:
        """Describe the span; never with payloads."""

    def set_error(self, kind: str) -> None:
        """Mark the span as failed; ``kind`` is a class of errors, such as an exception's name."""

    def add_event(
        self, name: str, attributes: Mapping[str, AttributeValue], at_ns: int | None = None
    ) -> None:
        """Note what happened at an instant, in nanoseconds since the epoch; now where none is given."""


_current: ContextVar[Span | None] = ContextVar("agentweave_span", default=None)


def traceparent() -> str | None:
    """Return the position to put into an outgoing head, None where there is no trace."""
    span = _current.get()
    return None if span is None else span.traceparent


def handed_on(received: str | None) -> AbstractContextManager[Span]:
    """Make ``received`` the position in the trace for the block, without a span; where tracing is off."""
    if received is None and _current.get() is None:
        return _NO_SPAN
    position = TraceParent.parse(received) or TraceParent.parse(traceparent())
    return _NO_SPAN if position is None else _handed_on(position)


def inner_span(
    name: str, attributes: Mapping[str, AttributeValue] | None = None
) -> AbstractContextManager[Span]:
    """Open a span below the current one, if that is recorded; else nothing is."""
    current = _current.get()
    if current is None or current.recorder is None:
        return _NO_SPAN
    position = TraceParent.parse(current.traceparent)
    return current.recorder.span(name, "internal", position, attributes)


def note(event: str, attributes: Mapping[str, AttributeValue]) -> None:
    """Note an event on the current span, if there is one."""
    if (current := _current.get()) is not None:
        current.add_event(event, attributes)


@contextmanager
def bound(span: Span, position: TraceParent) -> Iterator[None]:
    """Make ``span``, which is at ``position``, the current one for the block, and name it in the logs."""
    token = _current.set(span)
    try:
        with log_context(trace=position, span=None if span.recorder is None else position.span_id):
            yield
    finally:
        _current.reset(token)


class _HandedOn:
    """The span of no tracing: it only knows what was received."""

    __slots__ = ("traceparent",)

    recorder = None

    def __init__(self, traceparent: str | None) -> None:
        self.traceparent = traceparent

    def rename(self, name: str) -> None:
        pass

    def set_attribute(self, name: str, value: AttributeValue) -> None:
        pass

    def set_error(self, kind: str) -> None:
        pass

    def add_event(
        self, name: str, attributes: Mapping[str, AttributeValue], at_ns: int | None = None
    ) -> None:
        pass


@contextmanager
def _handed_on(position: TraceParent) -> Iterator[Span]:
    span = _HandedOn(str(position))
    with bound(span, position):
        yield span


# Nothing was received and nothing is current, so there is nothing to bind: this is what most calls open.
_NO_SPAN: Final[AbstractContextManager[Span]] = nullcontext(_HandedOn(None))
