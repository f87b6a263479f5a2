"""One trace across processes' worth of agents: each call a client span, each handler a server span below it."""

from __future__ import annotations

import itertools

import anyio
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agentweave_bus import SecureAgent, on_event
from agentweave_bus.bus import refusal_rate
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.config import TracingConfig
from agentweave_bus.observability.tracing import Tracing
from agentweave_bus.runtime import wiring
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, FRONT, MALLORY, PATIENCE
from tests.integration.world import metric
from tests.security.forging import forged_call, reply_of

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

    def create(_config, **named):
        return real(TracingConfig(enabled=True), **named, exporter=kept)

    monkeypatch.setattr(wiring.Tracing, "create", create)
    return kept


async def test_client_agent_and_nested_agent_are_one_trace(world, exporter):
    await world.agent(ECHO)
    await world.agent(FRONT)
    cli = await world.client(CLI)
    await cli.ask(FRONT, "relay", {"path": [str(ECHO)], "name": "say", "payload": {"text": SECRET}})
    await world.clear()  # what is not sent yet is sent at the end
    remote = [one for one in exporter.get_finished_spans() if "rpc.method" in one.attributes]
    spans = {(one.kind.name, one.attributes["rpc.method"]): one for one in remote}
    relayed, said = f"{FRONT}/relay", f"{ECHO}/say"
    asked, relaying, asking, saying = (
        spans[key] for key in (("CLIENT", relayed), ("SERVER", relayed), ("CLIENT", said), ("SERVER", said))
    )
    assert len(remote) == 4
    assert {one.context.trace_id for one in exporter.get_finished_spans()} == {asked.context.trace_id}
    assert asked.parent is None
    assert relaying.parent.span_id == asked.context.span_id
    assert saying.parent.span_id == asking.context.span_id
    (handling,) = [one for one in exporter.get_finished_spans() if one.name == "handle relay"]
    assert handling.parent.span_id == relaying.context.span_id
    assert asking.parent.span_id == handling.context.span_id
    assert SECRET not in "".join(one.to_json() for one in exporter.get_finished_spans())


async def test_a_trace_is_believed_of_nobody_but_who_is_proved_to_have_sent_the_call(
    world, mallory, exporter
):
    """Of a frame whose trace was replaced on the way nothing is; who is proved and denied is seen as such."""
    await world.agent(ECHO)
    genuine = forged_call(world.issue(CLI), trace=trace_of("a"))
    await mallory.send(genuine.head.sub, genuine.frame, reply_of(genuine))
    replaced = forged_call(world.issue(CLI), trace=trace_of("b"))
    frame = replaced.frame.replace(trace_of("b").encode(), trace_of("c").encode())
    await mallory.send(replaced.head.sub, frame, reply_of(replaced))
    denied = forged_call(world.issue(MALLORY), iss=MALLORY, trace=trace_of("d"))
    await mallory.send(denied.head.sub, denied.frame, reply_of(denied, MALLORY))
    await world.refusal("echo", step_name="authorization")
    await world.clear()
    spans = exporter.get_finished_spans()
    served = {one.context.trace_id: one for one in spans if one.kind.name == "SERVER"}
    assert {f"{number:032x}" for number in served} == {"a" * 32, "d" * 32}
    assert served[int("a" * 32, 16)].parent.span_id == int("a" * 16, 16)
    assert served[int("d" * 32, 16)].attributes["error.type"] == "denied"
    refused = {
        one.attributes["agentweave.admission.refused_at"]: one
        for one in spans
        if "agentweave.admission.refused_at" in one.attributes
    }
    assert set(refused) == {"proof", "authorization"}
    assert refused["proof"].parent is None
    assert [event.name for event in refused["proof"].events] == ["size", "frame", "chain"]
    assert refused["proof"].attributes["error.type"] == "refused"
    assert refused["authorization"].parent.span_id == served[int("d" * 32, 16)].context.span_id
    assert not {f"{one.context.trace_id:032x}" for one in spans} & {"b" * 32, "c" * 32}


async def test_a_flood_of_what_nobody_signed_makes_no_more_spans_than_records(
    world, mallory, exporter, monkeypatch
):
    monkeypatch.setattr(refusal_rate, "_BURST", 3)
    monkeypatch.setattr(refusal_rate, "_PER_SECOND", 0.0)
    echo = await world.agent(ECHO)
    for _ in range(10):
        await mallory.send(call_subject(ECHO, "say"), b"no frame", "aw.inbox.nobody")
    counted = "agentweave_admission_refusals_total"
    await until(lambda: metric(echo.parts, counted, step="frame", reason="refused") == 10, "ten refusals")
    recorded = len(world.refusals("echo"))
    await world.clear()
    assert recorded == len(exporter.get_finished_spans()) == 3


class Listener(SecureAgent):
    """Hears what is published while it is there."""

    @on_event("order.*", durable=False)
    async def hear(self, number: int) -> None:
        self.heard.set()


async def test_a_live_event_is_processed_below_who_published_it(bus, exporter):
    await bus.grant("client/shop", Listener, "order.made", kinds=["event"])
    listener = await bus.start(Listener)
    listener.heard = anyio.Event()
    shop = await bus.client("client/shop")
    await shop.publish("order.made", {"number": 1})
    with anyio.fail_after(PATIENCE):
        await listener.heard.wait()
    await bus.aclose()
    spans = {one.name.partition(" aw.")[0]: one for one in exporter.get_finished_spans()}
    above = ("publish", "process order.*", "handle order.*")
    for parent, child in itertools.pairwise(above):
        assert spans[child].parent.span_id == spans[parent].context.span_id
    assert spans["process order.*"].attributes["messaging.destination.template"] == "order.*"


def trace_of(digit):
    return f"00-{digit * 32}-{digit * 16}-01"
