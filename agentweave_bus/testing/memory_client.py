"""A connection to the in-memory broker, with the surface of the client library that the bus uses.

It stands in for ``nats.aio.client.Client``: ``connect``, ``publish``, ``subscribe``, ``flush``, ``close``,
``max_payload``, and the two tasks by whose end the bus learns that a connection is lost. Each subscription
has a bounded queue and a task that hands over one message at a time, as in the library. Anything else of the
library's client is not there, and using it is an ``AttributeError``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import nats.errors
from nats.aio.msg import Msg

if TYPE_CHECKING:
    from nats.aio.client import Client


__all__ = ["Broker", "MemoryClient", "MemorySubscription"]

MessageHandler = Callable[[Msg], Awaitable[None]]
ErrorHandler = Callable[[Exception], Awaitable[None]]

_MAX_PENDING: Final = 512 * 1024


class Broker(Protocol):
    """What a connection needs of its broker."""

    max_payload: int

    def attach(self, client: MemoryClient) -> None:
        """Let a connection in."""

    def detach(self, client: MemoryClient) -> None:
        """Forget a connection."""

    def subscribed(self, subscription: MemorySubscription) -> bool:
        """Take note of a subscription; false when it is forbidden."""

    def unsubscribed(self, subscription: MemorySubscription) -> None:
        """Take note of the end of a subscription."""

    def publish(
        self, sender: MemoryClient, subject: str, data: bytes, reply: str, headers: dict[str, str] | None
    ) -> None:
        """Route what a connection sends."""


class MemorySubscription:
    """What :meth:`MemoryClient.subscribe` returns."""

    def __init__(
        self, client: MemoryClient, subject: str, queue: str, handler: MessageHandler, limit: int
    ) -> None:
        self.client = client
        self.subject = subject
        self.queue = queue
        self._handler = handler
        self._pending: asyncio.Queue[Msg] = asyncio.Queue(limit)
        self._task = asyncio.get_running_loop().create_task(self._hand_over())

    def put(self, message: Msg) -> None:
        """Queue a message; one that finds the queue full is dropped and reported, as in the library."""
        try:
            self._pending.put_nowait(message)
        except asyncio.QueueFull:
            error = nats.errors.SlowConsumerError(
                subject=self.subject, reply=message.reply, sid=0, sub=cast("Any", self)
            )
            self.client.report(error)

    async def drain(self) -> None:
        """Take no more messages and return when those that have come are handled."""
        if self.client.is_closed:
            raise nats.errors.ConnectionClosedError
        self.client.forget(self)
        await self._pending.join()
        self._task.cancel()

    async def unsubscribe(self) -> None:
        """Take no more messages; those that have come are dropped."""
        if self.client.is_closed:
            raise nats.errors.ConnectionClosedError
        self.client.forget(self)
        self._task.cancel()

    def end(self) -> asyncio.Task[None]:
        """Stop handing over; returns the task that did, which the caller awaits."""
        self._task.cancel()
        return self._task

    async def _hand_over(self) -> None:
        while True:
            message = await self._pending.get()
            try:
                await self._handler(message)
            except Exception as error:  # noqa: BLE001 - whatever a handler raises is reported, as the library does
                self.client.report(error)
            finally:
                self._pending.task_done()


class MemoryClient:
    """One connection to ``broker``.

    ``user`` is the SPIFFE ID whose permissions hold, ``None`` for one that may do anything. ``check`` is
    called by :meth:`connect` in place of the TLS handshake; what it raises refuses the connection.
    """

    def __init__(
        self, broker: Broker, user: str | None = None, *, check: Callable[[], None] = lambda: None
    ) -> None:
        self.broker = broker
        self.user = user
        self.is_closed = False
        self.pending_data_size = 0
        """How many bytes wait to be sent: none ever do."""
        self.subscriptions: list[MemorySubscription] = []
        self._check = check
        self._error_cb: ErrorHandler | None = None
        self._closed_cb: Callable[[], Awaitable[None]] | None = None
        self._ended = asyncio.Event()
        # Both by the names that bus/connection.py watches.
        self._reading_task: asyncio.Task[Any] | None = None
        self._flusher_task: asyncio.Task[Any] | None = None
        self._reports: set[asyncio.Task[None]] = set()

    def as_client(self) -> Client:
        """Return this object as what it stands in for."""
        return cast("Client", self)

    @property
    def max_payload(self) -> int:
        """The largest message, in bytes."""
        return self.broker.max_payload

    async def connect(
        self,
        *_servers: str,
        error_cb: ErrorHandler | None = None,
        closed_cb: Callable[[], Awaitable[None]] | None = None,
        **_options: object,
    ) -> None:
        """Connect; options that are about sockets mean nothing here."""
        self._check()
        self._error_cb, self._closed_cb = error_cb, closed_cb
        self.broker.attach(self)
        loop = asyncio.get_running_loop()
        self._reading_task = loop.create_task(self._until_ended(), name="in-memory connection")
        self._flusher_task = loop.create_task(self._until_ended(), name="in-memory connection")

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send a message."""
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        if len(payload) > self.max_payload:
            raise nats.errors.MaxPayloadError
        self.broker.publish(self, subject, bytes(payload), reply, dict(headers) if headers else None)

    async def subscribe(
        self,
        subject: str,
        queue: str = "",
        cb: MessageHandler | None = None,
        pending_msgs_limit: int = _MAX_PENDING,
        pending_bytes_limit: int = 0,  # noqa: ARG002 - messages are counted, not bytes
    ) -> MemorySubscription:
        """Have ``cb`` called with each message on ``subject``."""
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        if cb is None:
            raise nats.errors.Error("the in-memory broker wants a callback")
        made = MemorySubscription(self, subject, queue, cb, pending_msgs_limit)
        self.subscriptions.append(made)
        if not self.broker.subscribed(made):
            self.subscriptions.remove(made)
            made.end()
        return made

    async def flush(self, timeout: float = 10) -> None:  # noqa: ARG002, ASYNC109 - the library's signature
        """Wait until the broker has everything, which it has at once."""
        if self.is_closed:
            raise nats.errors.ConnectionClosedError
        await asyncio.sleep(0)

    async def close(self) -> None:
        """Disconnect."""
        was_open = not self.is_closed
        if was_open:
            self.cut()
        mine = asyncio.current_task()
        tasks = [one.end() for one in self.subscriptions]
        tasks += [task for task in (self._reading_task, self._flusher_task) if task is not None]
        await asyncio.gather(*(one for one in tasks if one is not mine), return_exceptions=True)
        if was_open and self._closed_cb is not None:
            await self._closed_cb()

    def cut(self) -> None:
        """Lose the connection, as when the broker goes away."""
        self.is_closed = True
        self.broker.detach(self)
        self._ended.set()
        for one in self.subscriptions:
            one.end()

    def forget(self, subscription: MemorySubscription) -> None:
        """End a subscription."""
        if subscription in self.subscriptions:
            self.subscriptions.remove(subscription)
            self.broker.unsubscribed(subscription)

    def report(self, error: Exception) -> None:
        """Tell the error callback, in a task of its own as it may await."""
        if self._error_cb is None or self.is_closed:
            return
        task = asyncio.get_running_loop().create_task(self._told(error))
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _told(self, error: Exception) -> None:
        assert self._error_cb is not None
        await self._error_cb(error)

    async def _until_ended(self) -> None:
        await self._ended.wait()
