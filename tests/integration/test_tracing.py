"""One trace across processes' worth of agents: each call a client span, each handler a server span below it."""

from __future__ import annotations

import itertools

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agentweave_bus.observability.tracing import Tracing
from agentweave_bus.runtime import wiring
from tests.integration.probes import CLI, ECHO, FRONT

pytestmark = pytest.mark.anyio

SECRET = "a payload that no span may hold"


class Kept(InMemorySpanExporter):
    """Shared by three participants: the first to end must not close it for the others."""

    def shutdown(self):
        pass


@pytest.fixture
def exporter(monkeypatch):
    kept = Kept()
    real = Tracing.create

    def create(config, **named):
        return real(config, **named, exporter=kept)

    monkeypatch.setattr(wiring.Tracing, "create", create)
    return kept


async def test_client_agent_and_nested_agent_are_one_trace(world, exporter):
    on = {"observability__tracing": {"enabled": True}}
    await world.agent(ECHO, **on)
    await world.agent(FRONT, **on)
    cli = await world.client(CLI, **on)
    await cli.ask(FRONT, "relay", {"path": [str(ECHO)], "name": "say", "payload": {"text": SECRET}})
    await world.clear()  # what is not sent yet is sent at the end
    spans = {(str(one.kind.name), one.attributes["rpc.method"]): one for one in exporter.get_finished_spans()}
    order = [("CLIENT", "relay"), ("SERVER", "relay"), ("CLIENT", "say"), ("SERVER", "say")]
    assert len(exporter.get_finished_spans()) == len(order)
    assert {one.context.trace_id for one in spans.values()} == {spans[order[0]].context.trace_id}
    assert spans[order[0]].parent is None
    for above, below in itertools.pairwise(order):
        assert spans[below].parent.span_id == spans[above].context.span_id
    assert spans[order[3]].attributes["rpc.service"] == str(ECHO)
    assert SECRET not in "".join(one.to_json() for one in spans.values())
