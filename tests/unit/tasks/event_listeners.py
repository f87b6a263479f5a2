"""Agents that hear of events and keep what they heard, and what tests of them wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from agentweave_bus import SecureAgent, capability, on_event, requires_peer
from agentweave_bus.bus.streams import dead_stream_name, event_consumer_name, events_stream_name
from agentweave_bus.envelope import decode_frame, decode_payload
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.testing import MemoryBus

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


class OlderShipping(Listener):
    """Shipping before it heard of all that happens to orders."""

    @on_event("order.created", retry=Retry(attempts=3, first_delay=1, last_delay=1))
    async def on_created(self, order_id: str) -> None:
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
    async with asyncio.timeout(30):
        while not check():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.001)


async def let(bus: MemoryBus, publisher: object, subscriber: object, *names: str, **more: Any) -> None:
    await bus.grant(publisher, subscriber, *names, kinds=["event"], **more)


def dead(bus: MemoryBus, agent: SecureAgent) -> list[str]:
    """The subjects of an agent's dead letters."""
    stream = bus.broker.jetstream.streams[dead_stream_name(agent.spiffe_id)]
    return [one.subject for one in stream.messages.values()]


def letter(bus: MemoryBus, agent: SecureAgent) -> dict[str, Any]:
    """What the record of an agent's one dead letter says."""
    stream = bus.broker.jetstream.streams[dead_stream_name(agent.spiffe_id)]
    (frame,) = [one.data for one in stream.messages.values() if one.subject.endswith(".record")]
    body: dict[str, Any] = decode_payload(decode_frame(frame).payload)
    return body


def pending(bus: MemoryBus, publisher: SpiffeID, agent: SecureAgent, *, ordered: bool = False) -> int:
    """How many of a publisher's events an agent was given and has not acknowledged."""
    stream = bus.broker.jetstream.streams[events_stream_name(publisher)]
    info = stream.consumers[event_consumer_name(agent.spiffe_id, ordered=ordered)].info()
    return int(info["num_ack_pending"] + info["num_pending"])
