"""Attack: an agent tells operators of events that were not published, or not so, as dead letters of its own.

It may write whatever it likes among its dead letters, and has a genuine event of the client's.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from agentweave_bus import SecureAgent, TaskFailedError, on_event
from agentweave_bus.bus.streams import dead_stream_name
from agentweave_bus.bus.subjects import event_subject, task_subject
from agentweave_bus.envelope import Draft, Kind, Sealed, encode_payload, new_id
from agentweave_bus.envelope.codec import pack
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.envelope.head import map_from_draft
from agentweave_bus.runtime.operators import DeadLetterCalls
from agentweave_bus.runtime.wiring import Connected
from agentweave_bus.spiffe_id import SpiffeID, domain_id
from agentweave_bus.tasks.dead_letters import DeadEvent, DeadLetters, LetterReference
from agentweave_bus.tasks.queue import Delivery
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.testing import MemoryBus
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import sealed_by

pytestmark = pytest.mark.anyio


class EvilAgent(SecureAgent):
    """Gives up whatever it hears."""

    @on_event("*", retry=Retry(attempts=1))
    async def on_all(self, **_data: Any) -> None:
        raise TaskFailedError("no")


class Den(NamedTuple):
    """The agent, by its parts, and an honest operator."""

    bus: MemoryBus
    evil: Connected
    operator: DeadLetterCalls
    genuine: dict[str, Any]
    """The dead letter of what the client did publish, as it is listed."""
    frame: bytes

    @property
    def event(self) -> DeadEvent:
        """What the genuine one says."""
        told = self.genuine["event"]
        return DeadEvent(SpiffeID(told["publisher"]), told["name"], told["id"], 1)

    def signed_by(self, key: str, **changes: Any) -> Sealed:
        """An event in the client's name, by somebody's key."""
        now_ms, payload = self.bus.clock.time_ns() // 1_000_000, encode_payload({"order_id": "forged"})
        client = self.bus.id("client/cli")
        draft = Draft(
            kind=Kind.EVENT,
            id=new_id(now_ms),
            aud=domain_id(client.trust_domain),
            cap="order.created",
            sub=event_subject(client, "order.created"),
            iat=now_ms,
            exp=now_ms + 60_000,
        )
        draft |= changes
        svid = self.bus.domain().issue(key)
        values = map_from_draft(draft, iss=client, x5t=svid.x5t, pd=sha256(payload), par=None)
        return sealed_by(svid, pack(values), payload)

    async def planted(self, frame: bytes, event: DeadEvent) -> dict[str, Any]:
        """Write a dead letter of ``frame`` that tells of ``event``; return its row in the list."""
        now_ms = self.bus.clock.time_ns() // 1_000_000
        delivery = Delivery(frame, event_subject(event.publisher, event.name), 1, now_ms, "")
        letters = DeadLetters(self.evil.me, self.evil.desk)
        await letters.write(delivery, "planted", digest=b"\x07" * 32, event=event)
        (row,) = [one for one in (await self.operator.list())["letters"] if one["reason"] == "planted"]
        return dict(row)

    async def not_believed(self, row: dict[str, Any], why: str) -> None:
        """It is listed, but not as an event, and nothing of what it holds is shown."""
        assert (row["state"], "event" in row) == ("unverified", False)
        shown = await self.operator.show(row["letter"], payload=True)
        assert why in shown["not_redrivable"]
        assert not {"event", "signed", "payload"} & set(shown)


@pytest.fixture
async def den(bus: MemoryBus) -> Den:
    await bus.grant("client/cli", "agent/evil", "*", kinds=["event"])
    operators = [{"who": str(bus.id("client/operator")), "may": ["control:redrive"]}]
    await bus.set_grants({**bus.grants.model_dump(mode="json", exclude_none=True), "operators": operators})
    evil = await bus.start(EvilAgent)
    parts = bus._held[0].parts
    cli = await bus.client("client/cli")
    await bus.client("client/operator")
    calls = bus._held[-1].parts
    assert parts is not None
    assert calls is not None
    await cli.publish("order.created", {"order_id": "o-1"})
    stream = bus.broker.jetstream.streams[dead_stream_name(evil.spiffe_id)]
    async with asyncio.timeout(20):
        while len(stream.messages) < 2:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.002)
    operator = DeadLetterCalls(calls)
    (row,) = (await operator.list())["letters"]
    place = LetterReference.parse(row["letter"]).subject("frame")
    (frame,) = [one.data for one in stream.messages.values() if one.subject == place]
    return Den(bus, parts, operator, row, frame)


@refused_by(Layer.CONTROL, "a dead event that its publisher has not signed", by=Adversary.AGENT)
async def test_by_another_key(den: Den) -> None:
    sealed = den.signed_by("agent/evil")
    row = await den.planted(sealed.frame, den.event._replace(id=sealed.head.id))
    await den.not_believed(row, "in the name of spiffe://test.local/client/cli")


@pytest.mark.parametrize("part", ["publisher", "name", "id"])
@refused_by(Layer.CONTROL, "a dead event told as another publisher's, name or id", by=Adversary.AGENT)
async def test_told_as_another(den: Den, part: str) -> None:
    other = {"publisher": den.bus.id("client/other"), "name": "order.paid", "id": new_id(1)}[part]
    # As another frame, for the place of the genuine one is taken: a second, honest event.
    sealed = den.signed_by("client/cli")
    event = den.event._replace(id=sealed.head.id)._replace(**{part: other})
    await den.not_believed(await den.planted(sealed.frame, event), "another event than its record says")


@refused_by(Layer.CONTROL, "a dead event dated ahead of when it was given up", by=Adversary.THIEF)
async def test_dated_ahead(den: Den) -> None:
    now_ms = den.bus.clock.time_ns() // 1_000_000
    sealed = den.signed_by("client/cli", iat=now_ms + 60_000, exp=now_ms + 120_000)
    row = await den.planted(sealed.frame, den.event._replace(id=sealed.head.id))
    await den.not_believed(row, "given up before its date")


@refused_by(Layer.CONTROL, "a genuine task, as a dead event", by=Adversary.AGENT)
async def test_a_task(den: Den) -> None:
    evil = den.evil.me
    sealed = den.signed_by("client/cli", kind=Kind.TASK, aud=evil, cap="work", sub=task_subject(evil, "work"))
    event = DeadEvent(den.bus.id("client/cli"), "work", sealed.head.id, 1)
    await den.not_believed(await den.planted(sealed.frame, event), "it holds a task")


@refused_by(Layer.CONTROL, "a dead event of a subject that is not its publisher's", by=Adversary.THIEF)
async def test_of_another_subject(den: Den) -> None:
    sealed = den.signed_by("client/cli", sub=event_subject(den.evil.me, "order.created"))
    row = await den.planted(sealed.frame, den.event._replace(id=sealed.head.id))
    await den.not_believed(row, "not where its publisher's are")


@refused_by(Layer.CONTROL, "a genuine dead event with another frame beside its record", by=Adversary.BROKER)
async def test_another_frame(den: Den) -> None:
    stream = den.bus.broker.jetstream.streams[dead_stream_name(den.evil.me)]
    place = LetterReference.parse(den.genuine["letter"]).subject("frame")
    number, stands = next(one for one in stream.messages.items() if one[1].subject == place)
    stream.messages[number] = replace(stands, data=den.signed_by("client/cli").frame)
    (row,) = (await den.operator.list())["letters"]
    await den.not_believed(row, "not the one that was given up")


async def test_the_genuine_one(den: Den) -> None:
    """Honest: it is listed as what it is, and shown with what it held."""
    assert (den.genuine["state"], den.genuine["event"]["name"]) == ("event", "order.created")
    shown = await den.operator.show(den.genuine["letter"], payload=True)
    assert shown["payload"] == {"order_id": "o-1"}
