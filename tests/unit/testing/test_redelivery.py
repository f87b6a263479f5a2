"""Redelivery in memory, by the virtual clock: hours of back-off in milliseconds."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from nats.aio.msg import Msg

from agentweave_bus.testing import VirtualClock
from agentweave_bus.testing.memory_broker import MemoryBroker
from agentweave_bus.testing.memory_client import MemoryClient

pytestmark = pytest.mark.anyio

HOUR = 3600 * 1_000_000_000


class Work:
    """A stream, a consumer of it, and what was given out: who, how often, and after how many hours."""

    def __init__(self, **consumer: Any) -> None:
        self.clock = VirtualClock()
        self.broker = MemoryBroker(self.clock.time_ns)
        self.client = MemoryClient(self.broker)
        self.given: list[tuple[bytes, int, int]] = []
        self.messages: list[Msg] = []
        stream = {"name": "work", "subjects": ["w.*"], "retention": "workqueue", "max_age": 100 * HOUR}
        self.stream = self.broker.jetstream.add_stream(stream)
        self._consumer = {"ack_policy": "explicit", **consumer}

    async def begin(self) -> None:
        self._began = asyncio.get_running_loop().time()
        await self.client.connect()
        await self.client.subscribe("pull", cb=self._received)
        body = {"stream_name": "work", "config": self._consumer}
        await self.client.publish("$JS.API.CONSUMER.DURABLE.CREATE.work.c", json.dumps(body).encode())
        await self.client.publish("$JS.API.CONSUMER.MSG.NEXT.work.c", b'{"batch": 100}', "pull")

    async def _received(self, message: Msg) -> None:
        hours = round((asyncio.get_running_loop().time() - self._began) / 3600)
        self.given.append((message.data, int(message.reply.split(".")[4]), hours))
        self.messages.append(message)


async def test_backoff_and_giving_up() -> None:
    work = Work(backoff=[HOUR, 2 * HOUR, 4 * HOUR], max_deliver=4)
    await work.begin()
    await work.client.publish("w.a", b"a")
    await work.clock.advance(20 * 3600)
    assert work.given == [(b"a", 1, 0), (b"a", 2, 1), (b"a", 3, 3), (b"a", 4, 7)]
    assert len(work.stream.messages) == 1  # given up, not gone
    await work.broker.close()


async def test_progress_keeps_it_and_giving_back_delays_it() -> None:
    work = Work(ack_wait=HOUR)
    await work.begin()
    await work.client.publish("w.a", b"a")
    for _ in range(3):
        await work.clock.advance(0.9 * 3600)
        await work.client.publish(work.messages[-1].reply, b"+WPI")
    assert len(work.given) == 1
    await work.client.publish(
        work.messages[-1].reply, json.dumps({"delay": 5 * HOUR}).encode().join((b"-NAK ", b""))
    )
    await work.clock.advance(5 * 3600)
    assert work.given[-1] == (b"a", 2, 8)
    await work.client.publish(work.messages[-1].reply, b"+ACK")
    await work.clock.advance(10 * 3600)
    assert len(work.given) == 2
    assert not work.stream.messages
    await work.broker.close()


async def test_what_is_too_old_is_gone() -> None:
    work = Work(ack_wait=60 * HOUR)
    await work.begin()
    await work.client.publish("w.a", b"a")
    await work.clock.advance(130 * 3600)
    assert work.given == [(b"a", 1, 0), (b"a", 2, 60)]
    await work.broker.close()


async def test_what_is_not_there_says_so() -> None:
    work = Work()
    await work.begin()
    told: list[Msg] = []

    async def hear(message: Msg) -> None:
        told.append(message)

    await work.client.subscribe("told", cb=hear)
    push = {"stream_name": "work", "config": {"durable_name": "p", "deliver_subject": "x"}}
    mirror = {"name": "m", "mirror": {"name": "work"}}
    for verb, body in (
        ("STREAM.PURGE.work", {}),
        ("STREAM.CREATE.m", mirror),
        ("CONSUMER.DURABLE.CREATE.work.p", push),
    ):
        await work.client.publish(f"$JS.API.{verb}", json.dumps(body).encode(), "told")
    await work.clock.advance(0)
    assert [json.loads(one.data)["error"]["code"] for one in told] == [501, 501, 501]
    await work.broker.close()
