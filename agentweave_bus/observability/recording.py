"""The recorder of spans: the only place, with :mod:`.otlp`, that touches OpenTelemetry.

Imported only where tracing is on.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from opentelemetry import context as ambient
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Status, StatusCode

from agentweave_bus.observability.otlp import Collector
from agentweave_bus.observability.spans import AttributeValue, Span, SpanKind, SpanRecorder, bound
from agentweave_bus.observability.traceparent import TraceParent

__all__ = ["Recorder"]

_LAST_SECONDS: Final = 2.0
_LAST_WORD_SECONDS: Final = 0.5

_KINDS: Final[Mapping[SpanKind, trace.SpanKind]] = {
    "internal": trace.SpanKind.INTERNAL,
    "server": trace.SpanKind.SERVER,
    "client": trace.SpanKind.CLIENT,
    "producer": trace.SpanKind.PRODUCER,
    "consumer": trace.SpanKind.CONSUMER,
}


class Recorder:
    """Records the spans of one participant; ``exporter`` gets them in batches, from a thread of its own.

    Without an exporter spans have their ids, which the logs name, and go nowhere.
    """

    def __init__(self, service: str, spiffe_id: str, exporter: SpanExporter | None) -> None:
        resource = Resource.create(
            {
                "service.name": service,
                "service.instance.id": str(uuid.uuid4()),
                "process.pid": os.getpid(),
                "agentweave.spiffe_id": spiffe_id,
            }
        )
        self._exporter = exporter
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        if exporter is not None:
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("agentweave_bus")

    @contextmanager
    def span(
        self,
        name: str,
        kind: SpanKind,
        above: TraceParent | None,
        attributes: Mapping[str, AttributeValue] | None,
        began_ns: int | None = None,
    ) -> Iterator[Span]:
        """Record a span below the position ``above`` for the block, in which it is the current one.

        It is so for OpenTelemetry's own interface, too: what a handler's libraries record stands below it.
        """
        span = self._tracer.start_span(
            name, _context_below(above), _KINDS[kind], dict(attributes or {}), start_time=began_ns
        )
        position = _position_of(span)
        recorded = _Recorded(span, str(position), self)
        token = ambient.attach(trace.set_span_in_context(span))
        try:
            with bound(recorded, position):
                yield recorded
        except BaseException as error:
            recorded.set_error(type(error).__name__)
            raise
        finally:
            ambient.detach(token)
            span.end()

    def shutdown(self) -> None:
        """Export what is left, for two seconds at most, and stop.

        Nothing of it outlives the process: a collector that hangs does not keep it from ending.
        """
        if isinstance(self._exporter, Collector) and self._exporter.unreachable:
            self._exporter.shutdown()
        ending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        ending.start()
        ending.join(_LAST_SECONDS)
        if ending.is_alive() and self._exporter is not None:
            self._exporter.shutdown()  # ends an attempt that waits for its turn
            ending.join(_LAST_WORD_SECONDS)  # to say what was lost


class _Recorded:
    """A span of OpenTelemetry behind our few methods."""

    __slots__ = ("_span", "recorder", "traceparent")

    def __init__(self, span: trace.Span, traceparent: str, recorder: Recorder) -> None:
        self._span = span
        self.traceparent: str | None = traceparent
        self.recorder: SpanRecorder | None = recorder

    def rename(self, name: str) -> None:
        self._span.update_name(name)

    def set_attribute(self, name: str, value: AttributeValue) -> None:
        self._span.set_attribute(name, value)

    def set_error(self, kind: str) -> None:
        self._span.set_attribute("error.type", kind)
        self._span.set_status(Status(StatusCode.ERROR))

    def add_event(
        self, name: str, attributes: Mapping[str, AttributeValue], at_ns: int | None = None
    ) -> None:
        self._span.add_event(name, attributes, timestamp=at_ns)


def _position_of(span: trace.Span) -> TraceParent:
    position = span.get_span_context()
    return TraceParent(f"{position.trace_id:032x}", f"{position.span_id:016x}", position.trace_flags.sampled)


def _context_below(above: TraceParent | None) -> ambient.Context:
    """Return an OpenTelemetry context; an empty one, never the ambient, where nothing is above."""
    if above is None:
        return ambient.Context()
    position = trace.SpanContext(
        trace_id=int(above.trace_id, 16),
        span_id=int(above.span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(int(above.sampled)),
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(position), ambient.Context())
