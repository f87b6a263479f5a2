"""Events on the bus in memory: who gets which, how often, in which order, and for whom."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agentweave_bus import RetryableError, on_event
from agentweave_bus.bus.streams import event_consumer_name, events_stream_name
from agentweave_bus.exceptions import AuthorizationError
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.testing import MemoryBus
from tests.unit.tasks.event_listeners import (
    Billing,
    Counting,
    Display,
    Heard,
    Listener,
    Sampler,
    Shipping,
    dead,
    let,
    until,
)

pytestmark = pytest.mark.anyio


async def test_an_event_reaches_its_handler_with_who_published_it_and_its_key(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    shipping = await bus.start(Shipping)
    cli = await bus.client()
    published = await cli.publish("order.line.added", {"order_id": "o-1"}, key="o-1")
    await until(lambda: len(shipping.heard) == 1)
    assert shipping.heard == [Heard("order.line.added", {"order_id": "o-1"}, "o-1")]
    (context,) = shipping.contexts
    assert (context.kind, context.caller_spiffe_id, context.via) == ("event", cli.spiffe_id, ())
    assert context.task_id == published.id
    (sent,) = bus.audit("client/cli", event="publish")
    await until(lambda: len(bus.audit(shipping, digest=published.digest)) == 2)
    admission, outcome = bus.audit(shipping, digest=published.digest)
    assert sent["digest"] == published.digest
    assert (sent["callee"], admission["callee"]) == ("spiffe://test.local", str(shipping.spiffe_id))
    assert (admission["action"], admission["allowed"]) == ("order.line.added", True)
    assert admission["input"]["context"]["kind"] == "event"
    assert admission["input"]["context"]["stored_at"] > 0
    assert (outcome["status"], outcome["attempt"]) == ("completed", 1)


async def test_each_group_gets_each_event_once_and_only_what_it_was_granted(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.created")
    await let(bus, "client/cli", "agent/counting", "*")
    replicas = [await bus.start(Shipping), await bus.start(Shipping)]
    counting = await bus.start(Counting)
    cli = await bus.client()
    for number in range(20):
        await cli.publish("order.created", {"order_id": f"o-{number}"})
    await cli.publish("order.paid", {"order_id": "o-0"})
    await until(lambda: len(counting.heard) == 21 and sum(len(one.heard) for one in replicas) == 20)
    heard = [one.data["order_id"] for replica in replicas for one in replica.heard]
    assert sorted(heard) == sorted(f"o-{number}" for number in range(20))


async def test_what_is_published_while_nobody_is_there_waits(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    shipping, cli = await bus.start(Shipping), await bus.client()
    await bus.stop(shipping)
    await cli.publish("order.created", {"order_id": "o-1"})
    again = await bus.start(Shipping)
    await until(lambda: len(again.heard) == 1)


async def test_a_subscriber_begins_with_what_comes_after_it(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    cli = await bus.client()
    await cli.publish("order.created", {"order_id": "before"})
    shipping = await bus.start(Shipping)
    await cli.publish("order.created", {"order_id": "after"})
    await until(lambda: bool(shipping.heard))
    assert [one.data["order_id"] for one in shipping.heard] == ["after"]


async def test_live_every_replica_hears_or_one_of_them(bus: MemoryBus) -> None:
    for name in ("display", "sampler"):
        await let(bus, "client/cli", f"agent/{name}", "order.*")
    displays = [await bus.start(Display), await bus.start(Display)]
    samplers = [await bus.start(Sampler), await bus.start(Sampler)]
    cli = await bus.client()
    for number in range(10):
        await cli.publish("order.created", {"order_id": f"o-{number}"})
    await until(lambda: all(len(one.heard) == 10 for one in displays))
    await until(lambda: sum(len(one.heard) for one in samplers) == 10)
    # What is not durable needs no consumer.
    stream = bus.broker.jetstream.streams[events_stream_name(cli.spiffe_id)]
    assert stream.consumers == {}


async def test_live_handlers_of_one_agent_may_overlap(bus: MemoryBus) -> None:
    class Watching(Listener):
        @on_event("order.*", durable=False, replicas="every")
        async def on_order(self, order_id: str) -> None:
            await self.hear(orders=order_id)

        @on_event("order.*", durable=False)
        async def on_one(self, order_id: str) -> None:
            await self.hear(one=order_id)

        @on_event("*", durable=False, replicas="every")
        async def on_any(self, order_id: str) -> None:
            await self.hear(any=order_id)

    await let(bus, "client/cli", "agent/watching", "order.*")
    watching, cli = await bus.start(Watching), await bus.client()
    for number in range(3):
        await cli.publish("order.created", {"order_id": f"o-{number}"})
    await until(lambda: len(watching.heard) == 9)
    assert bus.audit(watching, event="refusal") == []


async def test_what_is_published_in_a_handler_carries_what_it_follows_from(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/billing", "order.*")
    await let(
        bus, "agent/billing", "agent/ledger", "invoice.*", on_behalf_of="spiffe://test.local/client/cli"
    )

    class Ledger(Listener):
        @on_event("invoice.sent")
        async def on_sent(self, order_id: str) -> None:
            await self.hear(order_id=order_id)

    billing, ledger = await bus.start(Billing), await bus.start(Ledger)
    cli = await bus.client()
    await cli.publish("order.created", {"order_id": "o-1"})
    await until(lambda: len(ledger.heard) == 1)
    (context,) = ledger.contexts
    (link,) = context.via
    assert (link.iss, link.kind.value, link.cap) == (cli.spiffe_id, "event", "order.created")
    assert (context.caller_spiffe_id, context.key) == (billing.spiffe_id, "o-1")
    assert context.origin == cli.spiffe_id
    # An event of its own has no origin but itself, so the grant does not cover it.
    with pytest.raises(AuthorizationError, match="on_behalf_of"):
        await billing.publish("invoice.sent", {"order_id": "o-2"})


async def test_events_cross_trust_domains_where_both_are_trusted(bus: MemoryBus, tmp_path: Path) -> None:
    file = tmp_path / "shipping.yaml"
    file.write_text(
        "agent: {name: shipping, trust_domain: test.local}\n"
        "identity: {allowed_trust_domains: [test.local, partner.io]}\n"
    )
    theirs = "spiffe://partner.io/client/shop"
    for name in ("shipping", "counting"):
        await let(bus, theirs, f"agent/{name}", "order.*")
    shop = await bus.client(theirs)
    shipping, counting = await bus.start(Shipping, config=file), await bus.start(Counting)
    published = await shop.publish("order.created", {"order_id": "o-1"})
    await until(lambda: len(shipping.heard) == 1)
    (admission,) = bus.audit(shipping, digest=published.digest, event="admission")
    assert (admission["aud"], admission["caller"]) == ("spiffe://partner.io", theirs)
    # Who does not trust the other domain believes nothing of it: a dead letter in the end.
    for _ in range(12):
        await bus.clock.advance(11)
    await until(lambda: len(dead(bus, counting)) == 1)  # of an authority that is not known: no frame
    assert counting.heard == []
    assert {one["step_name"] for one in bus.audit(counting, event="refusal")} == {"chain"}


async def test_a_scope_limits_what_is_published_for_it(bus: MemoryBus) -> None:
    await let(bus, "agent/billing", "agent/counting", "invoice.*")
    await bus.grant("client/cli", "agent/billing", "bill", principals=["https://login.example"])
    billing, cli = await bus.start(Billing), await bus.client()
    principal = {"iss": "https://login.example", "sub": "ada"}
    whole = await cli.call(billing.spiffe_id, "bill", {"order_id": "o-1"}, principal=principal)
    assert whole.status == "completed"  # by default a principal's call reaches what the grants give
    (sent,) = bus.audit(billing, event="publish")
    assert "spiffe://test.local#*" in sent["input"]["context"]["scope"]
    only = await cli.call(billing.spiffe_id, "bill", {"order_id": "o-1"}, scope=[f"{billing.spiffe_id}#bill"])
    assert only.status == "failed"
    assert len(bus.audit(billing, event="publish")) == 1
    enough = [f"{billing.spiffe_id}#bill", "spiffe://test.local#invoice.sent"]
    done = await cli.call(billing.spiffe_id, "bill", {"order_id": "o-1"}, scope=enough)
    assert done.status == "completed"
    assert bus.audit(billing, event="publish")[-1]["input"]["context"]["scope"] == enough


async def test_ordered_events_are_handled_one_after_the_other_also_when_one_is_tried_again(
    bus: MemoryBus,
) -> None:
    class Ledger(Listener):
        @on_event("order.*", ordered=True, retry=Retry(attempts=3, first_delay=1, last_delay=1))
        async def on_order(self, number: int) -> None:
            await self.hear(number=number)

    await let(bus, "client/cli", "agent/ledger", "order.*")
    ledgers = [await bus.start(Ledger), await bus.start(Ledger)]
    cli = await bus.client()
    course: list[int] = []

    async def fail_once_at_two() -> None:
        last = max((one.heard for one in ledgers), key=lambda heard: len(heard) and heard[-1].data["number"])[
            -1
        ]
        course.append(last.data["number"])
        if course.count(2) == 1 and course[-1] == 2:
            raise RetryableError("later")

    for one in ledgers:
        one.then = fail_once_at_two
    for number in range(5):
        await cli.publish("order.moved", {"number": number}, key="o-1")
    await until(lambda: 2 in course)
    await bus.clock.advance(1.1)
    await until(lambda: len(course) == 6)
    assert course == [0, 1, 2, 2, 3, 4]


async def test_a_grant_that_comes_later_is_followed_and_one_that_goes_is_heeded(bus: MemoryBus) -> None:
    shipping, cli = await bus.start(Shipping), await bus.client()
    with pytest.raises(AuthorizationError):
        await cli.publish("order.created", {"order_id": "o-0"})
    await let(bus, cli, shipping, "order.created", "order.paid")
    stream = events_stream_name(cli.spiffe_id)
    name = event_consumer_name(shipping.spiffe_id, ordered=False)
    streams = bus.broker.jetstream.streams

    async def filters_are(*names: str) -> None:
        wanted = [f"aw.event.test=local.client/cli.{one}" for one in names]
        async with asyncio.timeout(30):
            while (
                stream not in streams
                or name not in streams[stream].consumers
                or streams[stream].consumers[name].config["filter_subjects"] != wanted
            ):
                await bus.clock.advance(0.5)

    await filters_are("order.created", "order.paid")
    await cli.publish("order.created", {"order_id": "o-1"})
    await until(lambda: len(shipping.heard) == 1)
    grants = bus.grants.model_dump(mode="json")
    grants["grants"][0]["capabilities"] = ["order.paid"]
    await bus.set_grants(grants)
    await filters_are("order.paid")


async def test_publishers_that_no_grant_names_are_not_heard_and_that_is_said(
    bus: MemoryBus, caplog: pytest.LogCaptureFixture
) -> None:
    await let(bus, "client/*", "agent/shipping", "order.*")
    await let(bus, "client/named", "agent/shipping", "order.*")
    shipping = await bus.start(Shipping)
    await (await bus.client("client/any")).publish("order.created", {"order_id": "unheard"})
    await (await bus.client("client/named")).publish("order.created", {"order_id": "heard"})
    await until(lambda: bool(shipping.heard))
    assert [one.data["order_id"] for one in shipping.heard] == ["heard"]
    assert "events of spiffe://test.local/client/* are not heard" in caplog.text
