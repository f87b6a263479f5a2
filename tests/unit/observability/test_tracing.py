"""Spans, and the trace across agents."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from agentweave_bus.config import TracingConfig
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.observability.logs import current_log_context
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
