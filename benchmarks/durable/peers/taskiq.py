"""Taskiq on NATS with JetStream: no TLS, no identity, no policy. What a task queue takes beside its bus."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, NamedTuple

from nats.js.api import ConsumerConfig
from taskiq import AckableMessage
from taskiq.receiver import Receiver
from taskiq_nats import NATSObjectStoreResultBackend, PullBasedJetStreamBroker

from benchmarks.durable.rows import AT_ONCE
from benchmarks.durable.stamps import StampWriter, stamped
from benchmarks.places import PAYLOAD, Place

__all__ = ["WORKERS", "client", "serve", "stream_of"]

WORKERS: Final = "workers"
_WINDOW: Final = 256
_FETCH_S: Final = 20.0


def stream_of(queue: str) -> str:
    """Return the name of the stream that plays a queue."""
    return f"taskiq-{queue}"


class _PullBroker(PullBasedJetStreamBroker):
    """Goes on after a fetch that ended in the common ``TimeoutError``, which its own loop does not expect."""

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:
        while True:
            try:
                async for message in super().listen():
                    yield message
            except TimeoutError:
                continue


class _Queue(NamedTuple):
    broker: PullBasedJetStreamBroker
    noop: Any
    stamped: Any


def _queue(place: Place, queue: str, act: Callable[[str], Any], stamp: Callable[[str], Any]) -> _Queue:
    name = stream_of(queue)
    broker = _PullBroker(
        place.address,
        subject=name,
        stream_name=name,
        durable=WORKERS,
        consumer_config=ConsumerConfig(durable_name=WORKERS),
        pull_consume_batch=AT_ONCE,
        pull_consume_timeout=_FETCH_S,  # without one a batch is waited for until it is full
    )
    if place.options["keeps"]:
        broker = broker.with_result_backend(NATSObjectStoreResultBackend(place.address))
    return _Queue(
        broker,
        broker.register_task(act, task_name="noop"),
        broker.register_task(stamp, task_name="stamped"),
    )


async def serve(place: Place, gate: asyncio.Event, ready: Callable[[], None]) -> None:
    """Receive as Taskiq's own worker command does, without the line that it logs of each task."""
    logging.getLogger("taskiq").setLevel(logging.WARNING)
    stamps, stop = StampWriter(place.options["starts"]), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

    async def noop(text: str) -> dict[str, Any]:
        del text
        await gate.wait()
        return {}

    async def stamp(text: str) -> dict[str, Any]:
        stamps.since(text)
        return {}

    broker = _queue(place, place.options["queue"], noop, stamp).broker
    broker.is_worker_process = True
    await broker.startup()
    try:
        with ThreadPoolExecutor() as pool:
            receiver = Receiver(broker, pool, max_async_tasks=AT_ONCE, run_startup=False)
            ready()
            await receiver.listen(stop)
    finally:
        await broker.shutdown()


class _Client:
    def __init__(self, queues: dict[str, _Queue]) -> None:
        self._queues = queues

    async def submit(self, queue: str, count: int) -> None:
        task, left = self._queues[queue].noop, iter(range(count))

        async def kick() -> None:
            for _ in left:
                await task.kiq(PAYLOAD)

        async with asyncio.TaskGroup() as group:
            for _ in range(_WINDOW):
                group.create_task(kick())

    async def submit_stamped(self, queue: str) -> None:
        await self._queues[queue].stamped.kiq(stamped())

    async def cancel(self, queue: str) -> float:
        raise NotImplementedError(queue)


@asynccontextmanager
async def client(place: Place) -> AsyncIterator[_Client]:
    """Connect; many tasks are kicked at once, each of which waits for its acknowledgement."""

    async def nothing(text: str) -> dict[str, Any]:
        return {"text": text}

    async with AsyncExitStack() as stack:
        queues = {}
        for name in place.options["queues"].split(","):
            queues[name] = _queue(place, name, nothing, nothing)
            await queues[name].broker.startup()
            stack.push_async_callback(queues[name].broker.shutdown)
        yield _Client(queues)
