"""Events that can't be published or handled, on the bus in memory: who is told, and what becomes of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agentweave_bus import RetryableError, TaskFailedError
from agentweave_bus.authz import Grants
from agentweave_bus.bus.slots import SlotOutcome, acknowledged
from agentweave_bus.bus.streams import events_stream_name
from agentweave_bus.control.broker import broker_users
from agentweave_bus.exceptions import AuthorizationError, CallRefusedError, NoResponderError
from agentweave_bus.tasks import publishing
from agentweave_bus.tasks.event_performer import EventPerformer
from agentweave_bus.tasks.queue import Acknowledgements, Delivery
from agentweave_bus.testing import MemoryBus
from tests.unit.tasks.event_listeners import (
    Billing,
    Counting,
    Display,
    OlderShipping,
    Shipping,
    dead,
    let,
    letter,
    pending,
    until,
)

pytestmark = pytest.mark.anyio


async def test_a_failure_that_may_pass_is_tried_again(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    shipping, cli = await bus.start(Shipping), await bus.client()

    async def fail_twice() -> None:
        if len(shipping.heard) < 3:
            raise RetryableError("not yet", retry_after=5)

    shipping.then = fail_twice
    await cli.publish("order.created", {"order_id": "o-1"})
    await until(lambda: len(shipping.heard) == 1)
    await bus.clock.advance(4)
    assert len(shipping.heard) == 1
    await bus.clock.advance(2)
    await until(lambda: len(shipping.heard) == 2)
    await bus.clock.advance(6)
    await until(lambda: len(shipping.heard) == 3)
    await until(lambda: len(bus.audit(shipping, event="outcome")) == 3)
    assert [one.attempt for one in shipping.heard] == [1, 2, 3]
    assert [one["status"] for one in bus.audit(shipping, event="outcome")] == [
        "failed",
        "failed",
        "completed",
    ]
    assert dead(bus, shipping) == []


async def test_exhausted_it_is_a_dead_letter_and_comes_no_more(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    shipping, cli = await bus.start(Shipping), await bus.client()

    async def fail() -> None:
        raise RetryableError("never")

    shipping.then = fail
    await cli.publish("order.created", {"order_id": "o-1"})
    for count in range(1, 4):
        await until(lambda count=count: len(shipping.heard) >= count)  # two short pauses fit into one second
        await bus.clock.advance(1.1)
    await until(lambda: len(dead(bus, shipping)) == 2)
    await bus.clock.advance(100)
    assert len(shipping.heard) == 3
    await until(lambda: pending(bus, cli.spiffe_id, shipping) == 0)


async def test_a_dead_letter_that_stands_already_is_one(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker died between writing it and acknowledging the event; the next one fails, too."""
    await let(bus, "client/cli", "agent/counting", "order.*")
    counting, cli = await bus.start(Counting), await bus.client()

    async def fail() -> None:
        raise TaskFailedError("no")

    counting.then = fail
    with monkeypatch.context() as patch:

        async def lost(*_: object) -> None: ...

        patch.setattr(Acknowledgements, "done", lost)
        await cli.publish("order.created", {"order_id": "o-1"})
        await until(lambda: len(dead(bus, counting)) == 2)
        await bus.clock.advance(1)
    await bus.clock.advance(31)
    await until(lambda: pending(bus, cli.spiffe_id, counting) == 0)
    assert len(dead(bus, counting)) == 2


@pytest.mark.parametrize("error", [TaskFailedError("no such order"), ValueError("a slip")])
async def test_what_would_fail_again_is_tried_once(bus: MemoryBus, error: Exception) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    shipping, cli = await bus.start(Shipping), await bus.client()

    async def fail() -> None:
        raise error

    shipping.then = fail
    await cli.publish("order.created", {"order_id": "o-1"})
    await until(lambda: len(dead(bus, shipping)) == 2)
    await until(lambda: pending(bus, cli.spiffe_id, shipping) == 0)
    assert len(shipping.heard) == 1


async def test_data_that_do_not_fit_are_a_dead_letter(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    shipping, cli = await bus.start(Shipping), await bus.client()
    await cli.publish("order.created", {"order": "o-1"})
    await until(lambda: len(dead(bus, shipping)) == 2)
    assert shipping.heard == []
    (refusal,) = bus.audit(shipping, event="refusal")
    assert refusal["step_name"] == "payload"
    await until(lambda: pending(bus, cli.spiffe_id, shipping) == 0)


async def test_a_peer_that_the_handler_does_not_admit_is_refused_and_acknowledged(bus: MemoryBus) -> None:
    await let(bus, "agent/billing", "agent/counting", "*")
    await bus.grant("client/cli", "agent/billing", "bill")
    counting, billing = await bus.start(Counting), await bus.start(Billing)
    await (await bus.client()).call(billing.spiffe_id, "bill", {"order_id": "o-1"})
    await until(lambda: len(bus.audit(counting, event="refusal")) == 1)
    await until(lambda: pending(bus, billing.spiffe_id, counting) == 0)
    assert counting.heard == []
    assert dead(bus, counting) == []


async def test_a_limit_of_the_grant_holds_for_both_sides(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/counting", "order.*", limits={"max_amount": 10})
    counting, cli = await bus.start(Counting), await bus.client()
    await cli.publish("order.created", {"amount": 10})
    with pytest.raises(AuthorizationError, match="max_amount"):
        await cli.publish("order.created", {"amount": 11})
    await until(lambda: len(counting.heard) == 1)


async def test_while_the_policy_does_not_answer_events_are_held_not_lost(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    gone, cli = await bus.start(Shipping), await bus.client()
    await bus.stop(gone)
    await cli.publish("order.created", {"order_id": "o-1"})
    with bus.opa_down():
        shipping = await bus.start(Shipping)
        await until(lambda: len(bus.audit(shipping, event="refusal")) >= 1)
        await bus.clock.advance(100)
        assert shipping.heard == []
    await bus.clock.advance(11)
    await until(lambda: len(shipping.heard) == 1)
    assert shipping.heard[0].attempt == 1


@pytest.mark.slow
async def test_held_for_hours_it_has_its_attempt(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/counting", "order.*")
    gone, cli = await bus.start(Counting), await bus.client()
    await bus.stop(gone)
    await cli.publish("order.created", {"order_id": "o-1"})
    with bus.opa_down():
        counting = await bus.start(Counting)
        await until(lambda: len(bus.audit(counting, event="refusal")) >= 1)
        for _ in range(75):
            await bus.clock.advance(100)
    await bus.clock.advance(11)
    await until(lambda: len(counting.heard) == 1)
    assert counting.heard[0].attempt == 1
    assert dead(bus, counting) == []


async def test_held_past_its_deadline_it_is_not_handled(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    gone, cli = await bus.start(Shipping), await bus.client()
    await bus.stop(gone)
    await cli.publish("order.created", {"order_id": "o-1"}, deadline=60)
    with bus.opa_down():
        shipping = await bus.start(Shipping)
        await until(lambda: len(bus.audit(shipping, event="refusal")) >= 1)
        await bus.clock.advance(71)
    await until(lambda: bus.audit(shipping, event="refusal")[-1]["step_name"] == "time")
    await until(lambda: pending(bus, cli.spiffe_id, shipping) == 0)
    assert shipping.heard == []


async def test_held_by_a_worker_that_stops_it_has_its_attempt_at_the_next(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/counting", "order.*")
    gone, cli = await bus.start(Counting), await bus.client()
    await bus.stop(gone)
    await cli.publish("order.created", {"order_id": "o-1"})
    with bus.opa_down():
        for _ in range(2):
            holding = await bus.start(Counting)
            await until(lambda: len(bus.audit("agent/counting", event="refusal")) >= 1)
            await bus.kill_worker(holding)
    counting = await bus.start(Counting)
    await until(lambda: len(counting.heard) == 1)
    assert counting.heard[0].attempt == 3


async def test_what_an_older_replica_could_not_take_the_newer_one_runs(bus: MemoryBus) -> None:
    """Given back by a replica without a handler for it, more often than it may be tried."""
    await let(bus, "client/cli", "agent/shipping", "order.*")
    first, cli = await bus.start(Shipping), await bus.client()
    await bus.stop(first)  # its subscription stays
    older = await bus.start(OlderShipping, name="shipping")
    await cli.publish("order.paid", {"order_id": "o-1"})
    for _ in range(9):
        await bus.clock.advance(1)
    await until(lambda: len(bus.audit(older, event="refusal")) >= 4)
    await bus.stop(older)
    newer = await bus.start(Shipping)
    await bus.clock.advance(11)
    await until(lambda: len(newer.heard) == 1)
    assert newer.heard[0].attempt > 3
    await until(lambda: pending(bus, cli.spiffe_id, newer) == 0)
    assert dead(bus, newer) == []


async def test_a_lost_worker_is_an_attempt(bus: MemoryBus) -> None:
    """Poison ends as a dead letter, although no attempt ever ended: after one, and nine that may be none."""
    await let(bus, "client/cli", "agent/counting", "order.*")
    counting, cli = await bus.start(Counting), await bus.client()
    begun = 0

    async def hang() -> None:
        nonlocal begun
        begun += 1
        await asyncio.sleep(1e6)

    counting.then = hang
    await cli.publish("order.created", {})
    for count in range(1, 11):
        await until(lambda count=count: begun == count)
        await bus.kill_worker(counting)
        counting = await bus.start(Counting)
        counting.then = hang
    await until(lambda: len(dead(bus, counting)) == 2)
    assert begun == 10
    body = letter(bus, counting)
    assert (body["attempts"], body["delivered"]) == (10, 11)
    assert body["reason"] == "given up: given out 10 times, and never acknowledged"


async def test_the_letter_of_data_that_never_fitted_says_that_nothing_ran(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    shipping, cli = await bus.start(Shipping), await bus.client()
    await cli.publish("order.created", {"order": "o-1"})
    await until(lambda: len(dead(bus, shipping)) == 2)
    assert letter(bus, shipping)["attempts"] == 0


def first_answer_is_unclear(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([SlotOutcome.UNCLEAR])
    monkeypatch.setattr(
        publishing,
        "acknowledged",
        lambda message, stream: next(answers, None) or acknowledged(message, stream),
    )


async def test_without_a_clear_word_it_is_published_again_and_handled_once(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    shipping, cli = await bus.start(Shipping), await bus.client()
    first_answer_is_unclear(monkeypatch)
    published = await cli.publish("order.created", {"order_id": "o-1"})
    await until(lambda: pending(bus, cli.spiffe_id, shipping) == 0 and bool(shipping.heard))
    stream = bus.broker.jetstream.streams[events_stream_name(cli.spiffe_id)]
    assert len(stream.messages) == 2
    sent = bus.audit("client/cli", event="publish")
    assert [one["id"] for one in sent] == [published.id] * 2
    assert sent[0]["digest"] != sent[1]["digest"] == published.digest
    assert len(shipping.heard) == 1


async def test_without_a_clear_word_it_is_heard_live_once(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time it is another envelope of the same event."""
    await let(bus, "client/cli", "agent/display", "order.*")
    display, cli = await bus.start(Display), await bus.client()
    first_answer_is_unclear(monkeypatch)
    published = await cli.publish("order.created", {"order_id": "o-1"})
    await until(lambda: bool(bus.audit(display, event="refusal")))
    (refusal,) = bus.audit(display, event="refusal")
    assert (refusal["step_name"], refusal["digest"]) == ("replay", published.digest)
    assert refusal["reason"] == "this event was handled before, and is heard live a second time"
    await cli.publish("order.created", {"order_id": "o-1"})  # an event of its own, of the same data
    await until(lambda: len(display.heard) == 2)


async def test_without_a_clear_word_for_long_it_is_heard_live_once(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await let(bus, "client/cli", "agent/display", "order.*")
    display, cli = await bus.start(Display), await bus.client()
    until_ns = bus.clock.monotonic_ns() + 100_000_000_000
    monkeypatch.setattr(
        publishing,
        "acknowledged",
        lambda message, stream: (
            SlotOutcome.UNCLEAR if bus.clock.monotonic_ns() < until_ns else acknowledged(message, stream)
        ),
    )
    publishing_it = asyncio.ensure_future(cli.publish("order.created", {"order_id": "o-1"}, timeout=300))
    while not publishing_it.done():
        await bus.clock.advance(1)
    await publishing_it
    await cli.publish("order.created", {"order_id": "o-2"})
    await until(lambda: display.heard[-1].data == {"order_id": "o-2"})
    assert len(display.heard) == 2


async def test_two_copies_that_were_both_given_back_are_not_let_go_for_each_other(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored twice, the event fails for a moment at two replicas, and each is then given what the other had."""
    await let(bus, "client/cli", "agent/shipping", "order.*")
    performers: dict[EventPerformer, Delivery] = {}
    perform, told = EventPerformer.perform, []

    async def note(self: EventPerformer, _publisher: object, delivery: Delivery) -> None:
        performers[self] = delivery
        await asyncio.sleep(3_600)  # the test gives out what is queued, and says what becomes of it

    async def done(_self: object, delivery: Delivery) -> None:
        told.append(("done", delivery.sequence))

    async def back(_self: object, delivery: Delivery, _delay_s: float) -> None:
        told.append(("back", delivery.sequence))

    async def fail() -> None:
        raise RetryableError("a moment")

    monkeypatch.setattr(EventPerformer, "perform", note)
    monkeypatch.setattr(Acknowledgements, "done", done)
    monkeypatch.setattr(Acknowledgements, "back", back)
    replicas = [await bus.start(Shipping), await bus.start(Shipping)]
    publisher = bus.id("client/cli")
    cli = await bus.client()
    for number in (1, 2):
        await cli.publish("order.created", {"order_id": f"o-{number}"})
    async with asyncio.timeout(30):
        while len(performers) < 2:
            await bus.clock.advance(1)
    (one, given), (other, _) = performers.items()
    for replica in replicas:
        replica.then = fail
    await perform(one, publisher, given._replace(sequence=1, delivered=1))
    await perform(other, publisher, given._replace(sequence=2, delivered=1))
    assert told == [("back", 1), ("back", 2)]
    for replica in replicas:
        replica.then = None
    await perform(other, publisher, given._replace(sequence=1, delivered=2))
    await perform(one, publisher, given._replace(sequence=2, delivered=2))
    assert told[2:] == [("done", 1), ("done", 2)]
    assert sum(len(replica.heard) for replica in replicas) == 4


async def test_what_the_broker_forbids_is_told_as_a_denial(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    await bus.start(Shipping)
    cli = await bus.client()
    await cli.publish("order.created", {"order_id": "o-1"})
    bus.broker.set_users(broker_users(Grants(), bus._identities, control=()))
    with pytest.raises(AuthorizationError) as denied:
        await cli.publish("order.created", {"order_id": "o-2"})
    assert denied.value.direction == "broker"


async def test_nobody_there_to_make_a_stream_is_told(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    cli = await bus.client()
    assert bus._role is not None
    bus._role._events = None
    waiting = asyncio.ensure_future(cli.publish("order.created", {"order_id": "o-1"}))
    await bus.clock.advance(20)
    with pytest.raises(NoResponderError, match="is a control role running"):
        await waiting


@pytest.mark.parametrize(
    ("name", "data", "options", "words"),
    [
        ("Order", {}, {}, "no event's name"),
        ("order.*", {}, {}, "no event's name"),
        ("order", {"x": object()}, {}, "no JSON form"),
        ("order", {}, {"deadline": 0}, "deadline"),
        ("order", {}, {"deadline": 8 * 86_400}, "deadline"),
        ("order", {}, {"key": ""}, "key"),
        ("order", {}, {"key": "a\nb"}, "key"),
    ],
)
async def test_what_can_be_no_event_is_refused_at_once(
    bus: MemoryBus, name: str, data: Any, options: dict[str, Any], words: str
) -> None:
    await let(bus, "client/cli", "agent/shipping", "*")
    cli = await bus.client()
    with pytest.raises(CallRefusedError, match=words):
        await cli.publish(name, data, **options)
