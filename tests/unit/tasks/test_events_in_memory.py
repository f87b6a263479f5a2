"""Events on the bus in memory: who gets which, how often, and what becomes of those that can't be handled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus import RetryableError, SecureAgent, TaskFailedError, capability, on_event, requires_peer
from agentweave_bus.authz import Grants
from agentweave_bus.bus.slots import SlotOutcome, acknowledged
from agentweave_bus.bus.streams import dead_stream_name, event_consumer_name, events_stream_name
from agentweave_bus.control.broker import broker_users
from agentweave_bus.exceptions import AuthorizationError, CallRefusedError, NoResponderError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks import publishing
from agentweave_bus.tasks.queue import Acknowledgements
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.testing import MemoryBus

pytestmark = pytest.mark.anyio

ONCE = Retry(attempts=1)


@dataclass(frozen=True)
class Heard:
    """What a handler saw."""

    event: str | None
    data: dict[str, Any]
    key: str | None = None
    attempt: int = 1


class Listener(SecureAgent):
    """Hears, and does what its test says."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.heard: list[Heard] = []
        self.contexts: list[Any] = []
        self.then: Callable[[], Awaitable[None]] | None = None

    async def hear(self, **data: Any) -> None:
        context = self.context
        self.contexts.append(context)
        self.heard.append(Heard(context.event, data, context.key, context.attempt))
        if self.then is not None:
            await self.then()


class Shipping(Listener):
    @on_event("order.*", retry=Retry(attempts=3, first_delay=1, last_delay=1))
    async def on_order(self, order_id: str) -> None:
        await self.hear(order_id=order_id)


class Counting(Listener):
    @requires_peer("spiffe://test.local/client/*")
    @on_event("*", retry=ONCE)
    async def on_all(self, **data: Any) -> None:
        await self.hear(**data)


class Display(Listener):
    @on_event("order.*", durable=False, replicas="every")
    async def on_every(self, order_id: str) -> None:
        await self.hear(order_id=order_id)


class Sampler(Listener):
    @on_event("order.*", durable=False)
    async def on_one(self, order_id: str) -> None:
        await self.hear(order_id=order_id)


class Billing(Listener):
    """Publishes in turn, while it handles something."""

    @on_event("order.created")
    async def on_created(self, order_id: str) -> None:
        await self.publish("invoice.sent", {"order_id": order_id}, key=order_id)

    @capability("bill")
    async def bill(self, order_id: str) -> None:
        await self.publish("invoice.sent", {"order_id": order_id})


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not check():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.001)


async def let(bus: MemoryBus, publisher: object, subscriber: object, *names: str, **more: Any) -> None:
    await bus.grant(publisher, subscriber, *names, kinds=["event"], **more)


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


def dead(bus: MemoryBus, agent: SecureAgent) -> list[str]:
    """The subjects of an agent's dead letters."""
    stream = bus.broker.jetstream.streams[dead_stream_name(agent.spiffe_id)]
    return [one.subject for one in stream.messages.values()]


async def test_exhausted_it_is_a_dead_letter_and_comes_no_more(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    shipping, cli = await bus.start(Shipping), await bus.client()

    async def fail() -> None:
        raise RetryableError("never")

    shipping.then = fail
    await cli.publish("order.created", {"order_id": "o-1"})
    for count in range(1, 4):
        await until(lambda count=count: len(shipping.heard) == count)
        await bus.clock.advance(1.1)
    await until(lambda: len(dead(bus, shipping)) == 2)
    await bus.clock.advance(100)
    assert len(shipping.heard) == 3
    await until(lambda: pending(bus, cli.spiffe_id, shipping) == 0)


def pending(bus: MemoryBus, publisher: SpiffeID, agent: SecureAgent, *, ordered: bool = False) -> int:
    """How many of a publisher's events an agent was given and has not acknowledged."""
    stream = bus.broker.jetstream.streams[events_stream_name(publisher)]
    info = stream.consumers[event_consumer_name(agent.spiffe_id, ordered=ordered)].info()
    return int(info["num_ack_pending"] + info["num_pending"])


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
    await until(lambda: len(dead(bus, counting)) == 2)
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


async def test_a_lost_worker_is_an_attempt(bus: MemoryBus) -> None:
    """Poison ends as a dead letter, although no attempt ever ended."""
    await let(bus, "client/cli", "agent/counting", "order.*")
    counting, cli = await bus.start(Counting), await bus.client()
    entered = asyncio.Event()

    async def hang() -> None:
        entered.set()
        await asyncio.sleep(1e6)

    counting.then = hang
    await cli.publish("order.created", {})
    await entered.wait()
    await bus.kill_worker(counting)
    again = await bus.start(Counting)
    await until(lambda: len(dead(bus, again)) == 2)
    assert again.heard == []


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
        async with asyncio.timeout(10):
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


async def test_without_a_clear_word_it_is_published_again_and_handled_once(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    shipping, cli = await bus.start(Shipping), await bus.client()
    answers = iter([SlotOutcome.UNCLEAR])
    monkeypatch.setattr(
        publishing,
        "acknowledged",
        lambda message, stream: next(answers, None) or acknowledged(message, stream),
    )
    published = await cli.publish("order.created", {"order_id": "o-1"})
    await until(lambda: pending(bus, cli.spiffe_id, shipping) == 0 and bool(shipping.heard))
    stream = bus.broker.jetstream.streams[events_stream_name(cli.spiffe_id)]
    assert len(stream.messages) == 2
    sent = bus.audit("client/cli", event="publish")
    assert [one["id"] for one in sent] == [published.id] * 2
    assert sent[0]["digest"] != sent[1]["digest"] == published.digest
    assert len(shipping.heard) == 1


async def test_what_the_broker_forbids_is_told_as_a_denial(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    await bus.start(Shipping)
    cli = await bus.client()
    await cli.publish("order.created", {"order_id": "o-1"})
    bus.broker.set_users(broker_users(Grants(), bus._identities, control=()))
    with pytest.raises(AuthorizationError) as denied:
        await cli.publish("order.created", {"order_id": "o-2"})
    assert denied.value.direction == "broker"


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
