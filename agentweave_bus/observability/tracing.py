"""Tracing as configured: what makes the spans of one participant.

The position in a trace travels as a W3C ``traceparent``, a plain string in the signed head. With
tracing off nothing of OpenTelemetry is imported, and a span costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from agentweave_bus.config import TracingConfig
from agentweave_bus.observability.spans import AttributeValue, Span, SpanKind, handed_on, traceparent
from agentweave_bus.observability.traceparent import TraceParent

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from agentweave_bus.observability.recording import Recorder

__all__ = ["Tracing"]


class Tracing:
    """Makes spans. ``Tracing.off()`` for none, ``Tracing.create(...)`` as configured."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = recorder

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
        from agentweave_bus.observability.recording import Recorder  # noqa: PLC0415 -- only where it is on

        if exporter is None and config.otlp_endpoint is not None:
            from agentweave_bus.observability.otlp import otlp_exporter  # noqa: PLC0415 -- likewise

            exporter = otlp_exporter(config.otlp_endpoint)
        return cls(Recorder(service, spiffe_id, exporter))

    @property
    def enabled(self) -> bool:
        """Whether spans are recorded."""
        return self._recorder is not None

    @staticmethod
    def traceparent() -> str | None:
        """Return the position to put into an outgoing head, None where there is no trace."""
        return traceparent()

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
        if self._recorder is None:
            return handed_on(parent)
        position = TraceParent.parse(parent) or TraceParent.parse(traceparent())
        return self._recorder.span(name, kind, position, attributes)

    def received(
        self,
        name: str,
        *,
        kind: SpanKind,
        parent: str | None,
        attributes: Mapping[str, AttributeValue],
        began_ns: int,
    ) -> AbstractContextManager[Span]:
        """Open the span of something that came from outside, which began some time ago.

        It stands below ``parent``, the traceparent that came with it, or begins a trace: never below what
        happens to be current here. Tracing must be on.
        """
        assert self._recorder is not None
        return self._recorder.span(name, kind, TraceParent.parse(parent), attributes, began_ns)

    def shutdown(self) -> None:
        """Export what is left and stop; spans after this are dropped."""
        if self._recorder is not None:
            self._recorder.shutdown()
