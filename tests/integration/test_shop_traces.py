"""One order of the shop is one trace: through the five agents that carry it out, as a call and as a task that
is tried again in another worker, and on to who hears of it. The agents are the example's, on a bus in memory."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from agentweave_bus import AgentWeaveClient, SpiffeID
from agentweave_bus.config import LoggingConfig, TracingConfig
from agentweave_bus.exceptions import AuthorizationError
from agentweave_bus.observability.logs import configure_logging
from agentweave_bus.observability.tracing import Tracing
from agentweave_bus.runtime import wiring
from agentweave_bus.testing import MemoryBus
from workers.ecommerce.database import DATA_VARIABLE
from workers.ecommerce.directory import GATEWAY, INVENTORY, ORDER, PAYMENT, TRUST_DOMAIN, USER
from workers.ecommerce.gateway import GatewayAgent
from workers.ecommerce.inventory import InventoryAgent
from workers.ecommerce.order import OrderAgent
from workers.ecommerce.payment import PaymentAgent
from workers.ecommerce.user import UserAgent

pytestmark = pytest.mark.anyio

PRINCIPAL = {"iss": "https://login.shop.example", "sub": "alice"}
QUEUE = f"aw.task.{TRUST_DOMAIN.replace('.', '=')}.agent/order.create_order"
TOPIC = f"aw.event.{TRUST_DOMAIN.replace('.', '=')}.agent/order.order.confirmed"
SECRET = "a-name-that-no-span-may-hold"


class Kept(InMemorySpanExporter):
    """Shared by all: the first to end must not close it for the others."""

    def shutdown(self) -> None:
        pass


class Trace:
    """The spans of one trace, and who stands below whom."""

    def __init__(self, spans: list[ReadableSpan]) -> None:
        self.spans = sorted(spans, key=lambda one: one.start_time or 0)
        self._by_id = {one.context.span_id: one for one in self.spans}

    @property
    def roots(self) -> list[ReadableSpan]:
        return [one for one in self.spans if one.parent is None]

    def below(self, parent: ReadableSpan) -> list[ReadableSpan]:
        return [one for one in self.spans if one.parent and one.parent.span_id == parent.context.span_id]

    def line(self, span: ReadableSpan) -> list[str]:
        """The names from the root to ``span``, each with its service."""
        above = [] if span.parent is None else self.line(self._by_id[span.parent.span_id])
        return [*above, f"{service(span)}: {span.name}"]

    def named(self, name: str, kind: str = "INTERNAL") -> list[ReadableSpan]:
        return [one for one in self.spans if one.name == name and one.kind.name == kind]

    def one(self, name: str, kind: str = "INTERNAL") -> ReadableSpan:
        (found,) = self.named(name, kind)
        return found


class Observed(NamedTuple):
    call: Trace
    declined: Trace
    task: Trace
    spans: tuple[ReadableSpan, ...]
    logs: list[dict[str, Any]]


def service(span: ReadableSpan) -> str:
    return str(span.resource.attributes["service.name"])


def facts(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.fixture(scope="module")
def kept() -> Iterator[Kept]:
    exporter, real = Kept(), Tracing.create

    def create(_config: TracingConfig, **named: Any) -> Tracing:
        return real(TracingConfig(enabled=True), **named, exporter=exporter)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wiring.Tracing, "create", create)
        yield exporter


@pytest.fixture(scope="module")
async def observed(kept: Kept, tmp_path_factory: pytest.TempPathFactory, anyio_backend: str) -> Observed:
    """What is seen of one order that is called for, and one that is submitted and tried again elsewhere."""
    stream = io.StringIO()
    restore = configure_logging(LoggingConfig(level="INFO"), stream=stream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DATA_VARIABLE, str(tmp_path_factory.mktemp("shop")))
        try:
            async with MemoryBus(TRUST_DOMAIN, policy="workers/ecommerce/grants.yaml") as bus:
                await use(bus)
        finally:
            restore()
    spans = kept.get_finished_spans()
    ordered = [one.context.trace_id for one in spans if one.name == "handle create_order"]
    traces = [Trace([one for one in spans if one.context.trace_id == number]) for number in set(ordered)]
    call, declined, task = sorted(traces, key=lambda one: one.spans[0].start_time or 0)
    return Observed(
        call,
        declined,
        task,
        spans,
        [json.loads(line) for line in stream.getvalue().splitlines()],
    )


async def use(bus: MemoryBus) -> None:
    first = await bus.start(OrderAgent)
    payment = await bus.start(PaymentAgent)
    for kind in (UserAgent, InventoryAgent, GatewayAgent):
        await bus.start(kind)
    web = await bus.client("client/web")
    user = await routed(web, "user", "create_user", {"email": "alice@shop.example", "name": SECRET})
    wanted = {
        "user_id": user["user_id"],
        "items": [{"sku": "WIDGET-001", "quantity": 1}],
        "payment_method": "credit_card",
    }
    await routed(web, "order", "create_order", wanted)
    request = {"service": "order", "action": "create_order"}
    request["payload"] = {**wanted, "payment_method": "expired_card"}
    assert (await web.call(GATEWAY, "route", request, principal=PRINCIPAL)).status == "failed"
    await bus.stop(payment)
    task = await web.submit(ORDER, "create_order", wanted, principal=PRINCIPAL)
    while (await task.status()).retry_at is None:
        await bus.clock.advance(0.5)  # until it's clear that nobody takes the money
    await bus.stop(first)
    await bus.start(OrderAgent)
    await bus.start(PaymentAgent)
    await bus.clock.advance(60)
    assert (await task.result(30.0)).status == "completed"
    while (await routed(web, "user", "get_profile", {"user_id": user["user_id"]}))["orders"] < 2:
        await bus.clock.advance(0.5)  # until both orders were heard of
    with pytest.raises(AuthorizationError):
        await web.call(PAYMENT, "refund", {"order_id": SECRET})


async def routed(web: AgentWeaveClient, service: str, action: str, payload: dict[str, Any]) -> Any:
    request = {"service": service, "action": action, "payload": payload}
    result = await web.call(GATEWAY, "route", request, principal=PRINCIPAL)
    assert result.status == "completed", result
    return result.data


def call_of(agent: SpiffeID, capability: str) -> str:
    return f"{agent}/{capability}"


ASKED = [
    (USER, "get_user"),
    (INVENTORY, "check_availability"),
    (INVENTORY, "reserve_items"),
    (PAYMENT, "process_payment"),
]
TO_THE_ORDER = [
    f"web: {call_of(GATEWAY, 'route')}",
    f"gateway: {call_of(GATEWAY, 'route')}",
    "gateway: handle route",
    f"gateway: {call_of(ORDER, 'create_order')}",
    f"order: {call_of(ORDER, 'create_order')}",
    "order: handle create_order",
]


async def test_a_call_is_one_trace_through_all_five_agents(observed: Observed) -> None:
    trace = observed.call
    assert [one.name for one in trace.roots] == [call_of(GATEWAY, "route")]
    assert {service(one) for one in trace.spans} == {
        "web",
        "gateway",
        "order",
        "user",
        "inventory",
        "payment",
    }
    assert trace.line(trace.one("handle create_order")) == TO_THE_ORDER
    steps = ["quote", "quote", "reserve", "charge"]
    for step, (agent, capability) in zip(steps, ASKED, strict=True):
        name, method = agent.path.rpartition("/")[2], call_of(agent, capability)
        asked = [
            f"order: step {step}",
            f"order: {method}",
            f"{name}: {method}",
            f"{name}: handle {capability}",
        ]
        assert trace.line(trace.one(f"handle {capability}")) == [*TO_THE_ORDER, *asked]
        assert trace.one(method, "CLIENT").attributes == {
            "rpc.system.name": "agentweave",
            "rpc.method": method,
            "server.address": str(agent),
        }
        served = facts(trace.one(method, "SERVER"))
        assert (served["rpc.method"], served["agentweave.caller"]) == (method, str(ORDER))


async def test_each_request_is_admitted_authorized_handled_and_answered_in_spans_of_its_own(
    observed: Observed,
) -> None:
    trace = observed.call
    served = trace.one(call_of(PAYMENT, "process_payment"), "SERVER")
    admitted, handled, replied = trace.below(served)
    assert [one.name for one in (admitted, handled, replied)] == ["admit", "handle process_payment", "reply"]
    assert [(event.attributes["agentweave.admission.step"], event.name) for event in admitted.events] == [
        (1, "size"),
        (2, "frame"),
        (3, "chain"),
        (4, "proof"),
        (5, "head"),
        (6, "binding"),
        (7, "delegation"),
        (8, "time"),
        (9, "replay"),
        (10, "payload"),
        (11, "authorization"),
        (9, "claim"),
        (12, "audit"),
    ]
    assert facts(admitted)["agentweave.audit_id"]
    (authorized,) = trace.below(admitted)
    decided = facts(authorized)
    assert decided["agentweave.authz.decision"] == "allow"
    assert (decided["agentweave.authz.direction"], decided["agentweave.authz.kind"]) == ("inbound", "call")
    assert decided["agentweave.authz.revision"]
    asked = trace.one(call_of(PAYMENT, "process_payment"), "CLIENT")
    outbound = trace.below(asked)[0]
    assert (outbound.name, facts(outbound)["agentweave.authz.direction"]) == ("authorize", "outbound")
    assert served.start_time <= admitted.start_time < admitted.events[0].timestamp <= authorized.start_time
    assert facts(handled)["code.function.name"] == "PaymentAgent.process_payment"


async def test_both_attempts_at_a_task_stand_below_its_submission_though_in_two_workers(
    observed: Observed,
) -> None:
    trace = observed.task
    sent = trace.one(f"submit {QUEUE}", "PRODUCER")
    assert trace.roots == [sent]
    first, *between, second = trace.named(f"process {QUEUE}", "CONSUMER")
    assert not between
    for processed in (first, second):
        assert processed.parent.span_id == sent.context.span_id
        said = facts(processed)
        assert said["messaging.system"] == "nats"
        assert (said["messaging.operation.type"], said["messaging.operation.name"]) == ("process", "process")
        assert said["messaging.destination.name"] == QUEUE
        assert said["messaging.message.id"] == facts(sent)["messaging.message.id"]
        assert said["messaging.message.body.size"] == facts(sent)["messaging.message.body.size"] > 50
    assert facts(sent)["messaging.operation.type"] == "send"
    workers = [one.resource.attributes["service.instance.id"] for one in (first, second)]
    assert workers[0] != workers[1]
    assert [one.name for one in trace.below(second)] == ["open", "admit", "handle create_order"]
    tried, again = trace.named("handle create_order")
    assert [facts(one)["agentweave.attempt"] for one in (tried, again)] == [1, 2]
    assert (facts(tried)["agentweave.retry"], facts(tried)["error.type"]) == (True, "failed")
    assert [one.status.status_code.name for one in (first, second)] == ["ERROR", "UNSET"]
    recorded = [event.attributes["agentweave.step"] for event in again.events]
    assert recorded == ["accept", "quote", "reserve"]
    assert trace.line(trace.one("handle process_payment"))[-4] == "order: step charge"


async def test_each_attempt_to_reach_somebody_is_noted_on_the_callers_span(observed: Observed) -> None:
    def attempts(span: ReadableSpan) -> list[Any]:
        return [one.attributes["agentweave.attempt"] for one in span.events if one.name == "sealed"]

    charging, charged = observed.task.named(call_of(PAYMENT, "process_payment"), "CLIENT")
    assert facts(charging)["error.type"] == "NoResponderError"
    assert attempts(charging) == list(range(1, len(attempts(charging)) + 1))
    assert len(attempts(charging)) > 1
    assert attempts(charged) == attempts(observed.task.one(f"submit {QUEUE}", "PRODUCER")) == [1]


async def test_an_order_that_is_declined_is_seen_to_fail_and_to_be_undone(observed: Observed) -> None:
    trace = observed.declined
    failed = {f"{service(one)}: {one.name}" for one in trace.spans if one.status.status_code.name == "ERROR"}
    charge = call_of(PAYMENT, "process_payment")
    assert failed == {
        *TO_THE_ORDER,
        "order: step charge",
        f"order: {charge}",
        f"payment: {charge}",
        "payment: handle process_payment",
    }
    assert facts(trace.one(charge, "SERVER"))["error.type"] == "failed"
    assert facts(trace.one("step charge"))["error.type"] == "TaskFailedError"
    refund = [*TO_THE_ORDER, "order: undo accept", f"order: {call_of(PAYMENT, 'refund')}"]
    assert trace.line(trace.one(call_of(PAYMENT, "refund"), "CLIENT")) == refund


async def test_an_event_is_processed_below_the_handler_that_published_it(observed: Observed) -> None:
    for trace in (observed.call, observed.task):
        heard = trace.one("handle order.confirmed")
        told = ["order: handle create_order", f"order: publish {TOPIC}", f"user: process {TOPIC}"]
        assert trace.line(heard)[-4:] == [*told, "user: handle order.confirmed"]
        published = trace.one(f"publish {TOPIC}", "PRODUCER")
        assert facts(published)["messaging.destination.name"] == TOPIC
        assert facts(trace.one(f"process {TOPIC}", "CONSUMER"))["agentweave.delivery"] == 1


async def test_spans_hold_no_payload_and_there_are_none_of_what_was_not_sent(observed: Observed) -> None:
    assert SECRET not in "".join(one.to_json() for one in observed.spans)
    (denied,) = [one for one in observed.spans if facts(one).get("error.type") == "AuthorizationError"]
    assert (denied.name, denied.kind.name) == ("_OTHER", "CLIENT")  # no grant of the client names it


async def test_the_logs_of_all_five_agents_name_the_trace_the_task_and_the_span(observed: Observed) -> None:
    for trace, agents in ((observed.call, 5), (observed.task, 4)):
        number = f"{trace.spans[0].context.trace_id:032x}"
        lines = [one for one in observed.logs if one.get("trace_id") == number]
        own = {one["logger"]: one for one in lines if one["logger"].startswith("agentweave_bus.agents.")}
        assert len(own) == agents, own
        spans = {f"{one.context.span_id:016x}": one for one in trace.spans}
        for one in own.values():
            assert spans[one["span_id"]].name.startswith(("handle ", "step "))
            assert one["task_id"]
            assert one["caller"].startswith("spiffe://")
