"""OpenTelemetry spans, and the trace that joins them across agents.

The position in a trace travels as a W3C ``traceparent``, a plain string in the signed head. With
tracing off nothing of OpenTelemetry is imported, a span costs next to nothing, and an incoming trace
is still handed on, so that one agent without tracing does not cut everybody else's trace in two.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol
from urllib.parse import urlsplit

from agentweave_bus.config import TracingConfig
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.observability.logs import log_context
from agentweave_bus.observability.traceparent import TraceParent

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

__all__ = ["Span", "SpanKind", "Tracing"]

SpanKind = Literal["internal", "server", "client", "producer", "consumer"]
AttributeValue = str | bool | int | float

_current: ContextVar[str | None] = ContextVar("agentweave_traceparent", default=None)


class Span(Protocol):
    """What a caller may do with a span."""

    @property
    def traceparent(self) -> str | None:
        """The position to hand on; None where no trace is known."""

    def set_attribute(self, name: str, value: AttributeValue) -> None:
        """Describe the span; never with payloads."""

    def set_error(self, kind: str) -> None:
        """Mark the span as failed; ``kind`` is a class of errors, such as an exception's name."""


class Tracing:
    """Makes spans. ``Tracing.off()`` for none, ``Tracing.create(...)`` as configured."""

    def __init__(self, backend: _Backend | None = None) -> None:
        self._backend = backend

    @classmethod
    def off(cls) -> Tracing:
        """Return one that records nothing and hands on the trace it is given."""
        return cls()

    @classmethod
    def create(
        cls, config: TracingConfig, *, service: str, spiffe_id: str, exporter: SpanExporter | None = None
    ) -> Tracing:
        """Return what ``config`` asks for; ``exporter`` replaces the configured one.

        Raises:
            ConfigurationError: an OTLP endpoint is configured, but its exporter is not installed.

        """
        if not config.enabled:
            return cls.off()
        if exporter is None and config.otlp_endpoint is not None:
            exporter = _otlp_exporter(config.otlp_endpoint)
        return cls(_Backend(service, spiffe_id, exporter))

    @property
    def enabled(self) -> bool:
        """Whether spans are recorded."""
        return self._backend is not None

    @staticmethod
    def traceparent() -> str | None:
        """Return the position to put into an outgoing head, None where there is no trace."""
        return _current.get()

    def span(
        self,
        name: str,
        *,
        kind: SpanKind = "internal",
        parent: str | None = None,
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> AbstractContextManager[Span]:
        """Open a span below ``parent`` (a received traceparent), else below the current one.

        A malformed ``parent`` counts as absent. An exception that leaves the block marks the span as
        failed with its class name; its message, which may quote a payload, is not recorded.
        """
        received = TraceParent.parse(parent) or TraceParent.parse(_current.get())
        if self._backend is None:
            return _NO_SPAN if received is None else _passed_on(received)
        return self._backend.span(name, kind, received, attributes or {})

    def shutdown(self) -> None:
        """Export what is left and stop; spans after this are dropped."""
        if self._backend is not None:
            self._backend.shutdown()


class _PassedOn:
    """The span of no tracing: it only knows what was received."""

    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str | None) -> None:
        self.traceparent = traceparent

    def set_attribute(self, name: str, value: AttributeValue) -> None:
        pass

    def set_error(self, kind: str) -> None:
        pass


@contextmanager
def _bound(traceparent: str | None) -> Iterator[None]:
    token = _current.set(traceparent)
    try:
        with log_context(trace=traceparent):
            yield
    finally:
        _current.reset(token)


@contextmanager
def _passed_on(received: TraceParent) -> Iterator[Span]:
    traceparent = str(received)
    with _bound(traceparent):
        yield _PassedOn(traceparent)


# Nothing was received and nothing is current, so there is nothing to bind: this is what most calls open.
_NO_SPAN: Final[AbstractContextManager[Span]] = nullcontext(_PassedOn(None))


class _Backend:
    """The only place that touches OpenTelemetry."""

    def __init__(self, service: str, spiffe_id: str, exporter: SpanExporter | None) -> None:
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 -- only where tracing is on
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        resource = Resource({"service.name": service, "agentweave.spiffe_id": spiffe_id})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        if exporter is not None:
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("agentweave_bus")

    @contextmanager
    def span(
        self,
        name: str,
        kind: SpanKind,
        received: TraceParent | None,
        attributes: Mapping[str, AttributeValue],
    ) -> Iterator[Span]:
        from opentelemetry import trace  # noqa: PLC0415

        span = self._tracer.start_span(
            name,
            context=_context_below(received),
            kind=trace.SpanKind[kind.upper()],
            attributes=dict(attributes),
        )
        recorded = _Recorded(span)
        try:
            with _bound(recorded.traceparent):
                yield recorded
        except BaseException as error:
            recorded.set_error(type(error).__name__)
            raise
        finally:
            span.end()

    def shutdown(self) -> None:
        self._provider.shutdown()


def _context_below(received: TraceParent | None) -> Any:
    """Return an OpenTelemetry context; an empty one, never the ambient, where nothing was received."""
    from opentelemetry import trace  # noqa: PLC0415
    from opentelemetry.context import Context  # noqa: PLC0415

    if received is None:
        return Context()
    position = trace.SpanContext(
        trace_id=int(received.trace_id, 16),
        span_id=int(received.span_id, 16),
        is_remote=True,
        trace_flags=trace.TraceFlags(int(received.sampled)),
    )
    return trace.set_span_in_context(trace.NonRecordingSpan(position), Context())


class _Recorded:
    """A span of OpenTelemetry behind our few methods."""

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: Any) -> None:
        self._span = span
        position = span.get_span_context()
        self.traceparent: str | None = str(
            TraceParent(f"{position.trace_id:032x}", f"{position.span_id:016x}", position.trace_flags.sampled)
        )

    def set_attribute(self, name: str, value: AttributeValue) -> None:
        self._span.set_attribute(name, value)

    def set_error(self, kind: str) -> None:
        from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415

        self._span.set_attribute("error.type", kind)
        self._span.set_status(Status(StatusCode.ERROR))


def _otlp_exporter(endpoint: str) -> SpanExporter:
    try:
        module = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise ConfigurationError(
            "observability.tracing.otlp_endpoint needs a package that is not installed.",
            key="observability.tracing.otlp_endpoint",
            hint="Install opentelemetry-exporter-otlp-proto-http, or remove the setting.",
        ) from error
    url = endpoint if urlsplit(endpoint).path.strip("/") else f"{endpoint.rstrip('/')}/v1/traces"
    exporter: SpanExporter = module.OTLPSpanExporter(endpoint=url)
    return exporter
