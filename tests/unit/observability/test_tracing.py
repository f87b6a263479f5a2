"""Spans, and the trace across agents."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from agentweave_bus.config import TracingConfig
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.observability.logs import current_log_context
from agentweave_bus.observability.otlp import Collector, otlp_exporter
from agentweave_bus.observability.spans import handed_on, inner_span, note
from agentweave_bus.observability.traceparent import TraceParent
from agentweave_bus.observability.tracing import Tracing

RECEIVED = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def tracing_to(exporter: InMemorySpanExporter, service: str = "order") -> Tracing:
    return Tracing.create(
        TracingConfig(enabled=True),
        service=service,
        spiffe_id=f"spiffe://a.io/agent/{service}",
        exporter=exporter,
    )


def test_a_trace_crosses_from_one_agent_to_another() -> None:
    exporters = InMemorySpanExporter(), InMemorySpanExporter()
    caller, callee = tracing_to(exporters[0], "gateway"), tracing_to(exporters[1], "order")
    with caller.span("call create_order", kind="client") as sent:
        head_trace = caller.traceparent()
        assert head_trace == sent.traceparent
    with callee.span("create_order", kind="server", parent=head_trace), callee.span("authorize"):
        pass
    caller.shutdown()
    callee.shutdown()
    spans = {span.name: span for each in exporters for span in each.get_finished_spans()}
    assert {span.context.trace_id for span in spans.values()} == {spans["call create_order"].context.trace_id}
    assert spans["create_order"].parent.span_id == spans["call create_order"].context.span_id
    assert spans["create_order"].parent.is_remote
    assert spans["authorize"].parent.span_id == spans["create_order"].context.span_id
    assert spans["create_order"].kind.name == "SERVER"
    assert spans["create_order"].resource.attributes["agentweave.spiffe_id"] == "spiffe://a.io/agent/order"


def test_the_position_and_the_log_id_end_with_the_span(exporter: InMemorySpanExporter) -> None:
    tracing = tracing_to(exporter)
    with tracing.span("x") as span:
        parent = TraceParent.parse(span.traceparent)
        assert parent is not None
        assert current_log_context().trace_id == parent.trace_id
    assert tracing.traceparent() is None
    assert current_log_context().trace_id is None
    tracing.shutdown()


def test_an_exception_marks_the_span_without_its_message(exporter: InMemorySpanExporter) -> None:
    tracing = tracing_to(exporter)
    with pytest.raises(ValueError), tracing.span("x", attributes={"capability": "pay"}):
        raise ValueError("card 4111")
    tracing.shutdown()
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert dict(span.attributes) == {"capability": "pay", "error.type": "ValueError"}
    assert "4111" not in span.to_json()


def test_a_failure_without_exception_and_attributes(exporter: InMemorySpanExporter) -> None:
    tracing = tracing_to(exporter)
    with tracing.span("x") as span:
        span.set_attribute("decision", "denied")
        span.set_error("AuthorizationError")
    tracing.shutdown()
    (done,) = exporter.get_finished_spans()
    assert dict(done.attributes) == {"decision": "denied", "error.type": "AuthorizationError"}


def test_switched_off_the_received_trace_is_handed_on() -> None:
    tracing = Tracing.create(TracingConfig(), service="x", spiffe_id="spiffe://a.io/agent/x")
    assert not tracing.enabled
    with tracing.span("outer", parent=RECEIVED) as span:
        span.set_attribute("a", 1)
        span.set_error("X")
        with tracing.span("inner"):
            assert tracing.traceparent() == RECEIVED
            assert current_log_context().trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert tracing.traceparent() is None
    tracing.shutdown()


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "garbage",
        RECEIVED + "\n",
        RECEIVED.upper(),
        "01" + RECEIVED[2:],
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
    ],
)
def test_a_malformed_parent_counts_as_absent(text: str | None, exporter: InMemorySpanExporter) -> None:
    assert TraceParent.parse(text) is None
    tracing = tracing_to(exporter)
    with tracing.span("x", parent=text):
        pass
    tracing.shutdown()
    assert exporter.get_finished_spans()[0].parent is None


def test_a_traceparent_prints_as_it_was_read() -> None:
    assert str(TraceParent.parse(RECEIVED)) == RECEIVED
    fresh = TraceParent.new()
    assert TraceParent.parse(str(fresh)) == fresh
    assert not fresh.sampled


def test_a_missing_exporter_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    config = TracingConfig(enabled=True, otlp_endpoint="http://127.0.0.1:4318")
    with pytest.raises(ConfigurationError, match="opentelemetry-exporter-otlp-proto-http") as caught:
        Tracing.create(config, service="x", spiffe_id="spiffe://a.io/agent/x")
    assert caught.value.key == "observability.tracing.otlp_endpoint"


def test_a_process_without_tracing_does_not_load_opentelemetry() -> None:
    program = (
        "import sys\n"
        "from agentweave_bus.observability.tracing import Tracing\n"
        "with Tracing.off().span('x'): pass\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 0


def test_what_is_recorded_by_opentelemetrys_own_interface_stands_below(
    exporter: InMemorySpanExporter,
) -> None:
    """A handler's libraries know nothing of this package."""
    tracing, own = tracing_to(exporter), InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(own))
    with tracing.span("handle"), provider.get_tracer("library").start_as_current_span("query"):
        pass
    tracing.shutdown()
    (handled,), (query,) = exporter.get_finished_spans(), own.get_finished_spans()
    assert query.parent is not None
    assert (query.parent.trace_id, query.parent.span_id) == (
        handled.context.trace_id,
        handled.context.span_id,
    )


def test_what_was_received_stands_where_it_says_and_never_below_what_is_current(
    exporter: InMemorySpanExporter,
) -> None:
    tracing = tracing_to(exporter)
    began_ns = time.time_ns() - 1_000_000_000
    with tracing.span("current"):
        for parent in (None, RECEIVED):
            with tracing.received("x", kind="server", parent=parent, attributes={}, began_ns=began_ns):
                pass
    tracing.shutdown()
    root, below, _ = exporter.get_finished_spans()
    assert root.parent is None
    assert below.parent is not None
    assert f"{below.context.trace_id:032x}-{below.parent.span_id:016x}" == RECEIVED[3:-3]
    assert root.start_time == began_ns


def test_an_inner_span_needs_one_around_it(exporter: InMemorySpanExporter) -> None:
    tracing = tracing_to(exporter)
    with inner_span("alone") as alone:
        assert (alone.recorder, alone.traceparent) == (None, None)
    with handed_on(RECEIVED), inner_span("of somebody else's trace"):
        assert tracing.traceparent() == RECEIVED
    with tracing.span("outer"), inner_span("inner", {"a": 1}):
        note("told", {"b": 2})
    tracing.shutdown()
    inner, outer = exporter.get_finished_spans()
    assert (inner.name, inner.parent.span_id) == ("inner", outer.context.span_id)
    assert [(event.name, dict(event.attributes or {})) for event in inner.events] == [("told", {"b": 2})]


class Wavering(SpanExporter):
    """A collector that takes what it is told to take."""

    takes = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS if self.takes else SpanExportResult.FAILURE


def test_a_collector_that_takes_nothing_is_told_of_once_and_once_when_it_does_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    exporter = Wavering()
    collector = Collector("http://127.0.0.1:4318/v1/traces", exporter)
    for takes in (True, False, False, True, True):
        exporter.takes = takes
        collector.export([ReadableSpan("x"), ReadableSpan("y")])
        assert collector.unreachable is not takes
    where = "spans {} to http://127.0.0.1:4318/v1/traces "
    assert caplog.messages == [
        where.format("can't be delivered") + "and are dropped until they can",
        where.format("are delivered") + "again; 4 were dropped",
    ]


@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
        ("https://tempo.example/otlp/v1/traces", "https://tempo.example/otlp/v1/traces"),
    ],
)
def test_where_an_endpoint_has_no_path_that_of_otlp_is_meant(endpoint: str, url: str) -> None:
    exporter = otlp_exporter(endpoint)
    assert exporter._exporter._endpoint == url
    exporter.shutdown()


def test_spans_that_the_caller_did_not_sample_are_not_exported(exporter: InMemorySpanExporter) -> None:
    tracing = tracing_to(exporter)
    with tracing.span("x", parent=RECEIVED[:-1] + "0") as span:
        assert span.traceparent is not None
        assert span.traceparent.startswith(RECEIVED[:36])
        assert span.traceparent.endswith("-00")
    tracing.shutdown()
    assert exporter.get_finished_spans() == ()


def test_what_is_said_of_the_process_is_added_to_and_not_replaced_by_variables(
    exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "somebody else")
    forged = "agentweave.spiffe_id=spiffe://b.io/x,deployment.environment.name=blue"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", forged)
    tracing = tracing_to(exporter, "order")
    with tracing.span("x"):
        pass
    tracing.shutdown()
    said = exporter.get_finished_spans()[0].resource.attributes
    assert (said["service.name"], said["agentweave.spiffe_id"]) == ("order", "spiffe://a.io/agent/order")
    assert said["deployment.environment.name"] == "blue"
