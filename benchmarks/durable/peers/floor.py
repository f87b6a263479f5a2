"""The floor: the least Python that signs, verifies, decides and records a durable task, for comparison alone.

What it has: a task signed by its client, one signature for all that leave in one turn, and stored before its
submission returns; in the worker its signature, times and subject verified, a look at a table of who may
submit what, a chained audit record before anything runs and one of the outcome, in one write a turn; a signed
``working`` and a signed ``completed`` record, each stored in a slot that is written once, so that of several
workers one runs a task and one says how it ended; its acknowledgement after that.

What it has not, beside all that the calls' floor has not (:mod:`benchmarks.peers.floor`): the frames that an
audit log keeps, the records of an earlier attempt, retries, steps, handlers that fail or take too long, words
to the broker that one still runs, cancellation, priorities, times to start at, dead letters, results that are
large, and a stop that gives back what it has. What it can't verify or store stays in the queue.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any, Final

import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig, DiscardPolicy, RetentionPolicy, StreamConfig

from benchmarks.durable.rows import AT_ONCE
from benchmarks.durable.stamps import StampWriter, stamped
from benchmarks.peers import WrongAnswerError
from benchmarks.peers.floor import Audit, Opener, Sealer, now_milliseconds, opened_audit
from benchmarks.peers.raw import connected
from benchmarks.places import PAYLOAD, Place

__all__ = ["client", "serve"]

_CALLER: Final = "client"
_CALLEE: Final = "worker"
_NOOP: Final = "workers"
_STAMPED: Final = "stamped"
_MAY: Final = {(_CALLER, _CALLEE, one): "revision-1" for one in (_NOOP, _STAMPED)}
_LIFETIME_MS: Final = 86_400_000
_SKEW_MS: Final = 30_000
_WINDOW: Final = 256

Handler = Callable[[str], Awaitable[dict[str, Any]]]


def _tasks(queue: str) -> str:
    return f"floor-{queue}"


def _states(queue: str) -> str:
    return f"floor-{queue}-states"


class _Store:
    """Stores messages, and says when the broker has acknowledged them."""

    def __init__(self, connection: Client) -> None:
        self._connection = connection
        self._inbox = f"_INBOX.{os.urandom(16).hex()}"
        self._asked = 0
        self._answers: dict[str, asyncio.Future[bytes]] = {}

    async def begin(self) -> None:
        await self._connection.subscribe(f"{self._inbox}.*", cb=self._answered)

    async def _answered(self, message: Msg) -> None:
        self._answers.pop(message.subject).set_result(message.data)

    async def put(self, subject: str, frame: bytes) -> None:
        self._asked += 1
        reply = f"{self._inbox}.{self._asked}"
        answer = self._answers[reply] = asyncio.get_running_loop().create_future()
        await self._connection.publish(subject, frame, reply)
        if "error" in orjson.loads(await answer):
            raise WrongAnswerError("floor: not stored, or the slot is taken")


class _Worker:
    def __init__(self, place: Place, store: _Store, audit: Audit, handlers: Mapping[str, Handler]) -> None:
        self._sealer, self._opener = Sealer(place, _CALLEE), Opener()
        self._states = _states(place.options["queue"])
        self._store = store
        self._audit = audit
        self._handlers = handlers

    async def perform(self, message: Msg) -> None:
        now_ms = now_milliseconds()
        head, payload, digest = self._opener.open(message.data, now_ms)
        if (head["kind"], head["aud"], head["sub"]) != ("task", _CALLEE, message.subject):
            raise WrongAnswerError("floor: bound to something else")
        if not head["iat"] - _SKEW_MS <= now_ms < head["exp"]:
            raise WrongAnswerError("floor: not of this time")
        sender, action = head["iss"], head["cap"]
        facts = {"caller": sender, "action": action, "digest": digest.hex()}
        facts["revision"] = _MAY[sender, _CALLEE, action]
        asked = orjson.loads(payload)
        await self._audit.record({"event": "admission", "ts": now_ms, **facts})
        key = sha256(f"{sender} {action} {head['id']}".encode()).hexdigest()
        working = await self._record(f"{self._states}.{key}.0", digest, None, {"state": "working"})
        result = await self._handlers[action](asked["text"])
        await self._record(
            f"{self._states}.{key}.1", digest, working, {"state": "completed", "result": result}
        )
        self._audit.record_soon({"event": "outcome", "status": "completed", **facts})
        await message.ack()

    async def _record(self, slot: str, task: bytes, before: bytes | None, body: dict[str, Any]) -> bytes:
        """Sign a record and write it into a slot where nothing stands yet; return its digest."""
        head = {"kind": "record", "sub": slot, "iat": now_milliseconds(), "re": task, "prev": before}
        frame, digest = await self._sealer.seal(head, orjson.dumps(body))
        await self._store.put(slot, frame)
        return digest


async def serve(place: Place, gate: asyncio.Event, ready: Callable[[], None]) -> None:
    """Do tasks, :data:`AT_ONCE` at a time; stamped ones are pulled one by one."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    stamps, queue = StampWriter(place.options["starts"]), place.options["queue"]

    async def noop(text: str) -> dict[str, Any]:
        del text
        await gate.wait()
        return {}

    async def stamp(text: str) -> dict[str, Any]:
        stamps.since(text)
        return {}

    with opened_audit() as audit:
        async with connected(place, _CALLEE) as connection:
            store = _Store(connection)
            await store.begin()
            worker = _Worker(place, store, audit, {_NOOP: noop, _STAMPED: stamp})
            await _add_streams(connection, queue)
            for consumer, batch in ((_NOOP, AT_ONCE // 2), (_STAMPED, 1)):
                await _pull(connection, queue, consumer, batch, worker.perform)
            ready()
            await stop.wait()


async def _add_streams(connection: Client, queue: str) -> None:
    stream, tasks, states = connection.jetstream(), _tasks(queue), _states(queue)
    await stream.add_stream(
        StreamConfig(name=tasks, subjects=[f"{tasks}.*"], retention=RetentionPolicy.WORK_QUEUE)
    )
    await stream.add_stream(
        StreamConfig(
            name=states,
            subjects=[f"{states}.>"],
            discard=DiscardPolicy.NEW,
            discard_new_per_subject=True,
            max_msgs_per_subject=1,
        )
    )
    for consumer in (_NOOP, _STAMPED):
        config = ConsumerConfig(
            durable_name=consumer,
            filter_subject=f"{tasks}.{consumer}",
            ack_policy=AckPolicy.EXPLICIT,
            max_ack_pending=-1,
        )
        await stream.add_consumer(tasks, config)


async def _pull(
    connection: Client, queue: str, consumer: str, batch: int, perform: Callable[[Msg], Awaitable[None]]
) -> None:
    """Have two batches of tasks given out, and another one whenever as many as one are done."""
    inbox, asked = connection.new_inbox(), f"$JS.API.CONSUMER.MSG.NEXT.{_tasks(queue)}.{consumer}"
    request = orjson.dumps({"batch": batch})
    running: set[asyncio.Task[None]] = set()
    done = 0

    async def one(message: Msg) -> None:
        nonlocal done
        await perform(message)
        done += 1
        if done % batch == 0:
            await connection.publish(asked, request, inbox)

    async def take(message: Msg) -> None:
        task = asyncio.create_task(one(message))
        running.add(task)
        task.add_done_callback(running.discard)

    await connection.subscribe(inbox, cb=take)
    for _ in range(2):
        await connection.publish(asked, request, inbox)


class _Client:
    def __init__(self, place: Place, store: _Store, audit: Audit) -> None:
        self._sealer = Sealer(place, _CALLER)
        self._store = store
        self._audit = audit

    async def submit(self, queue: str, count: int) -> None:
        left = iter(range(count))

        async def some() -> None:
            for _ in left:
                await self._submit(queue, _NOOP, PAYLOAD)

        async with asyncio.TaskGroup() as group:
            for _ in range(_WINDOW):
                group.create_task(some())

    async def submit_stamped(self, queue: str) -> None:
        await self._submit(queue, _STAMPED, stamped())

    async def _submit(self, queue: str, action: str, text: str) -> None:
        now_ms, number, subject = now_milliseconds(), os.urandom(16).hex(), f"{_tasks(queue)}.{action}"
        facts = {"callee": _CALLEE, "action": action, "id": number}
        facts["revision"] = _MAY[_CALLER, _CALLEE, action]
        await self._audit.record({"event": "task", "ts": now_ms, **facts})
        times = {"iat": now_ms, "exp": now_ms + _LIFETIME_MS}
        head = {"kind": "task", "id": number, "aud": _CALLEE, "cap": action, "sub": subject, **times}
        frame, _ = await self._sealer.seal(head, orjson.dumps({"text": text}))
        await self._store.put(subject, frame)

    async def cancel(self, queue: str) -> float:
        raise NotImplementedError(queue)


@asynccontextmanager
async def client(place: Place) -> AsyncIterator[_Client]:
    """Connect; many tasks are submitted at once, each of which waits for its acknowledgement."""
    with opened_audit() as audit:
        async with connected(place, _CALLER) as connection:
            store = _Store(connection)
            await store.begin()
            yield _Client(place, store, audit)
