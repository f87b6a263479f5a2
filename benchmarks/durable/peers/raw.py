"""JetStream of nats-py alone, on the same broker over the same mutual TLS: publish, pull, acknowledge."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, RetentionPolicy, StreamConfig

from benchmarks.durable.stamps import StampWriter, stamped
from benchmarks.peers.raw import connected
from benchmarks.places import PAYLOAD, Place

__all__ = ["WORKERS", "client", "serve", "stream_of"]

WORKERS: Final = "workers"
_STAMPED: Final = "stamped"
_BATCH: Final = 256
_FETCH_S: Final = 20.0


def stream_of(queue: str) -> str:
    """Return the name of the stream that plays a queue, and its first subject's."""
    return f"raw-{queue}"


async def serve(place: Place, gate: asyncio.Event, ready: Callable[[], None]) -> None:
    """Pull in batches and acknowledge each message; stamped ones are pulled one by one."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    stamps, queue = StampWriter(place.options["starts"]), place.options["queue"]

    async def done(messages: Sequence[Msg]) -> None:
        await gate.wait()
        for message in messages:
            await message.ack()

    async def stamp(messages: Sequence[Msg]) -> None:
        for message in messages:
            stamps.since(message.data.decode())
            await message.ack()

    async with connected(place, "worker") as connection:
        stream = connection.jetstream()
        pulls = []
        for consumer, batch, act in ((WORKERS, _BATCH, done), (_STAMPED, 1, stamp)):
            subscription = await _subscribed(stream, queue, consumer)
            pulls.append(asyncio.create_task(_pull(subscription, batch, act)))
        ready()
        stopping = asyncio.create_task(stop.wait())
        ended, _ = await asyncio.wait([stopping, *pulls], return_when=asyncio.FIRST_COMPLETED)
        for pull in pulls:
            pull.cancel()
        await asyncio.gather(*pulls, return_exceptions=True)
        ended.pop().result()  # raises what ended a pull


async def _subscribed(
    stream: JetStreamContext, queue: str, consumer: str
) -> JetStreamContext.PullSubscription:
    name, subject = stream_of(queue), f"{stream_of(queue)}.{consumer}"
    await stream.add_stream(
        StreamConfig(name=name, subjects=[f"{name}.*"], retention=RetentionPolicy.WORK_QUEUE)
    )
    config = ConsumerConfig(
        durable_name=consumer, filter_subject=subject, ack_policy=AckPolicy.EXPLICIT, max_ack_pending=-1
    )
    await stream.add_consumer(name, config)
    return await stream.pull_subscribe_bind(consumer, name)


async def _pull(
    subscription: JetStreamContext.PullSubscription,
    batch: int,
    act: Callable[[Sequence[Msg]], Awaitable[None]],
) -> None:
    while True:
        try:
            await act(await subscription.fetch(batch, timeout=_FETCH_S))
        except TimeoutError:  # the library raises its own, and the common one
            continue


class _Client:
    def __init__(self, stream: JetStreamContext) -> None:
        self._stream = stream

    async def submit(self, queue: str, count: int) -> None:
        subject, payload = f"{stream_of(queue)}.{WORKERS}", PAYLOAD.encode()
        for _ in range(count):
            last = await self._stream.publish_async(subject, payload)
        await self._stream.publish_async_completed()
        last.result()  # raises where it was not stored

    async def submit_stamped(self, queue: str) -> None:
        await self._stream.publish(f"{stream_of(queue)}.{_STAMPED}", stamped().encode())

    async def cancel(self, queue: str) -> float:
        raise NotImplementedError(queue)


@asynccontextmanager
async def client(place: Place) -> AsyncIterator[_Client]:
    """Connect; tasks are published without waiting for each acknowledgement."""
    async with connected(place, "client") as connection:
        yield _Client(connection.jetstream())
