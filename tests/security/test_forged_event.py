"""Attack: events that their publisher never published, or published once, put among its events.

By who owns the broker, and so may publish anywhere: he writes into the stream of CLI's events, of which echo
hears. He has the honest event's bytes, and keys of his own.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from nats.aio.msg import Msg

from agentweave_bus import on_event
from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.streams import event_consumer, event_consumer_name, events_stream_name
from agentweave_bus.bus.subjects import event_subject, task_subject
from agentweave_bus.envelope import Kind, encode_payload
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.announcing import asked
from tests.integration.connections import Raw, heard_within, until
from tests.integration.probes import CLI, DOMAIN, ECHO, MALLORY, OTHER, Probe
from tests.integration.world import Caller, World
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, with_part

pytestmark = pytest.mark.anyio

CREATED = event_subject(CLI, "order.created")


class EventProbe(Probe):
    """Hears durably of all that it may, and on every replica of orders."""

    @on_event("*")
    async def on_all(self, order_id: str) -> None:
        self.ran.append(order_id)

    @on_event("order.*", durable=False, replicas="every")
    async def on_live(self, order_id: str) -> None:
        self.ran.append(f"live {order_id}")


@dataclass
class EventStage:
    """An honest event, which echo has handled, and somebody who saw it and writes what he likes."""

    world: World
    echo: Probe
    cli: Caller
    mallory: Raw
    honest: Msg
    expected: Step

    async def refused(self, count: int = 2, *, reason: str = "") -> None:
        """Both subscriptions, the durable and the live one, have refused it at the marked step."""
        await until(lambda: len(self.world.refusals("echo")) >= count, f"{count} refusals")
        for record in self.world.refusals("echo"):
            assert (record["step"], record["step_name"]) == (self.expected.number, self.expected.label), (
                record
            )
            assert reason in record["reason"], record
        assert sorted(self.echo.ran) == ["live o-1", "o-1"]
        await self.gone()

    async def gone(self) -> None:
        """Nothing is left to be given out: it was acknowledged, whatever became of it."""
        name = f"{events_stream_name(CLI)}.{event_consumer_name(ECHO, ordered=False)}"
        async with asyncio.timeout(20):
            while True:
                info = await asked(self.mallory, f"$JS.API.CONSUMER.INFO.{name}")
                if info["num_pending"] + info["num_ack_pending"] == 0:
                    return

    def forged(self, **changes: Any) -> bytes:
        """An event of CLI's that is honest but for ``changes``; signed by the key that ``signed_by`` has."""
        svid = changes.pop("svid", None) or self.world.issue(changes.pop("signed_by", CLI))
        now = clock_ms()
        values = {
            "iss": CLI,
            "kind": Kind.EVENT,
            "aud": SpiffeID(f"spiffe://{DOMAIN}"),
            "cap": "order.created",
            "sub": CREATED,
            "iat": now,
            "exp": now + 600_000,
            "reply": None,
            "payload": encode_payload({"order_id": "forged"}),
        } | changes
        return forged_call(svid, **values).frame


@pytest.fixture
async def stage(world: World, request: pytest.FixtureRequest) -> EventStage:
    marker = request.node.get_closest_marker("refused_by")
    echo = await world.agent(ECHO, EventProbe)
    cli, mallory = await world.client(CLI), await world.raw()
    seen = await mallory.listen(CREATED)
    await cli.client.publish("order.created", {"order_id": "o-1"})
    await until(lambda: len(echo.ran) == 2, "the honest event", lambda: (echo.ran, world.audit("echo")))
    return EventStage(
        world, echo, cli, mallory, await heard_within(seen), marker.args[0] if marker else Step.BINDING
    )


@refused_by(Step.BINDING, "an event of somebody else among a publisher's events", by=Adversary.BROKER)
async def test_of_somebody_else(stage: EventStage) -> None:
    await stage.mallory.send(CREATED, stage.forged(signed_by=MALLORY, iss=MALLORY))
    await stage.refused(reason="an event of spiffe://demo.test/client/mallory among those of")


@refused_by(Step.PROOF, "an event signed in the publisher's name with another key", by=Adversary.BROKER)
async def test_in_its_name(stage: EventStage) -> None:
    await stage.mallory.send(CREATED, stage.forged(signed_by=OTHER))
    await stage.refused(reason="in the name of")


@refused_by(Step.PROOF, "a genuine event with other data", by=Adversary.BROKER)
async def test_with_other_data(stage: EventStage) -> None:
    data = encode_payload({"order_id": "altered"})
    await stage.mallory.send(CREATED, with_part(stage.honest.data, "payload", lambda _: data))
    await stage.refused()


@refused_by(Step.BINDING, "a genuine event on the subject of another event", by=Adversary.BROKER)
async def test_on_another_subject(stage: EventStage) -> None:
    await stage.mallory.send(event_subject(CLI, "order.paid"), stage.honest.data)
    await stage.refused(reason="sealed for subject")


@refused_by(Step.BINDING, "a genuine event whose head names another subject", by=Adversary.THIEF)
@pytest.mark.parametrize(
    "changes",
    [
        {"sub": event_subject(CLI, "order.paid")},
        {"sub": event_subject(OTHER, "order.created")},
        {"cap": "order.paid"},
        {"aud": SpiffeID("spiffe://elsewhere.test")},
    ],
    ids=["another name", "another publisher", "another name in cap", "another domain"],
)
async def test_whose_head_is_of_elsewhere(stage: EventStage, changes: dict[str, Any]) -> None:
    """Even with the publisher's own key no event stands in another place than its head says."""
    await stage.mallory.send(CREATED, stage.forged(**changes))
    await stage.refused()


@refused_by(Step.BINDING, "a task on the subject of an event", by=Adversary.THIEF)
async def test_another_kind(stage: EventStage) -> None:
    task = {"kind": Kind.TASK, "aud": ECHO, "cap": "work", "sub": task_subject(ECHO, "work")}
    await stage.mallory.send(CREATED, stage.forged(**task))
    await stage.refused(reason="a task is no event")


@refused_by(Step.REPLAY, "a copy of a genuine event, stored again", by=Adversary.BROKER)
async def test_a_copy(stage: EventStage) -> None:
    await stage.mallory.send(CREATED, stage.honest.data)
    await stage.refused(reason="handled before")


@refused_by(Step.TIME, "an event that has expired", by=Adversary.BROKER)
async def test_expired(stage: EventStage) -> None:
    now = clock_ms()
    await stage.mallory.send(CREATED, stage.forged(iat=now - 10_000, exp=now - 1))
    await stage.refused(reason="expired")


@refused_by(
    Step.AUTHORIZATION,
    "an event that its subscriber was not granted, given out all the same",
    by=Adversary.BROKER,
)
async def test_not_granted(stage: EventStage) -> None:
    """The broker's owner widens the consumer; the policy of who receives it says no."""
    subject = event_subject(CLI, "invoice.paid")
    await given_out(stage, ["*"])
    try:
        await stage.mallory.send(subject, stage.forged(cap="invoice.paid", sub=subject))
        await stage.refused(1, reason="no grant lets")
    finally:
        await given_out(stage, ["order.*"])


async def given_out(stage: EventStage, patterns: list[str]) -> None:
    """Change which events echo's consumer is for."""
    spec = event_consumer(CLI, ECHO, patterns, ordered=False)
    body = {"stream_name": spec.stream, "config": spec.config, "action": "update"}
    answer = await asked(stage.mallory, f"$JS.API.CONSUMER.CREATE.{spec.stream}.{spec.name}", body)
    assert "error" not in answer


@refused_by(Step.FRAME, "what is no envelope on the subject of an event", by=Adversary.BROKER)
async def test_no_envelope(stage: EventStage) -> None:
    await stage.mallory.send(CREATED, b"order created, trust me")
    await stage.refused()
