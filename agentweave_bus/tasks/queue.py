"""Taking tasks from a queue: as many as can start at once, and no more.

A :class:`Puller` asks a consumer for as many tasks as there are free places, again whenever places become
free. What it gets is a :class:`Delivery`: the bytes of a task, how often it was given out, and when it was
stored. A delivery that nobody acknowledges comes again, to this worker or to another one; so nothing is lost
with a worker, a connection or an answer.

What counts is where a message is delivered: to an inbox that nobody can guess, on the subject of the queue
that was asked. What the broker says of it (the acknowledgement subject, the number of deliveries, the time)
is believed only of that. Headers are believed in nothing that was stored.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, NamedTuple

from nats.aio.msg import Msg

from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.bus.subjects import pull_inbox
from agentweave_bus.bus.turns import Turns
from agentweave_bus.exceptions import BusError, UnreachableError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["Acknowledgements", "Delivery", "PullSource", "Puller", "first_of", "read_delivery"]

_log = logging.getLogger(__name__)

_AGAIN_S: Final = 0.05  # a connection that was lost just now may not be known as such yet
_EXPIRES_S: Final = 30.0
_LATE_S: Final = 5.0
"""How long after the end of a request its status may still come. Then the request counts as lost."""

_AT_ONCE_S: Final = 1.0
_RECONNECT_S: Final = 30.0
_NANOSECONDS: Final = 1_000_000_000

_ACK_TOKENS: Final = 9  # $JS ACK stream consumer delivered sequence sequence time pending
_ACK_TOKENS_OF_ACCOUNT: Final = 11  # the same with domain and account before the stream

_ENDED: Final = frozenset({"404", "408", "409"})
_NO_QUEUE: Final = frozenset({"503"})


class Delivery(NamedTuple):
    """A task as the broker gave it out.

    ``subject`` is where it was queued, ``delivered`` how often it has been given out, this time included,
    and ``stored_at_ms`` when it was stored (milliseconds since the epoch). ``sequence`` is its number in the
    stream.
    """

    data: bytes
    subject: str
    delivered: int
    stored_at_ms: int
    acknowledgement: str
    """The subject on which it is acknowledged."""
    sequence: int = 0


class PullSource(NamedTuple):
    """A consumer that is pulled from; ``subject`` is the pattern for what it gives out."""

    stream: str
    consumer: str
    subject: str
    takes: Callable[[str], bool]
    """Says whether something on a subject can come from there."""


class Acknowledgements:
    """Tells the broker what became of deliveries, on whatever connection there is.

    None of it raises or waits for long: what the broker is not told, it asks again by delivering again.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    async def done(self, delivery: Delivery) -> None:
        """Say that the task has its outcome on record; the queue may forget it."""
        await self._tell(delivery, b"+ACK")

    async def back(self, delivery: Delivery, delay_s: float) -> None:
        """Have it delivered again after ``delay_s`` seconds."""
        await self._tell(delivery, b'-NAK {"delay": %d}' % int(delay_s * _NANOSECONDS))

    async def keep(self, delivery: Delivery) -> None:
        """Say that it is being worked on; the time for acknowledging it starts anew.

        Without a connection that waits for one: said late, too, it may keep the task from others.
        """
        await self._tell(delivery, b"+WPI", within_s=_RECONNECT_S)

    @property
    def connected_s(self) -> float:
        """For how many seconds the connection has stood on which they are told; 0 without one."""
        return self._keeper.connected_s

    async def _tell(self, delivery: Delivery, word: bytes, within_s: float = _AT_ONCE_S) -> None:
        try:
            session = await self._keeper.session(within_s)
            await session.publish(delivery.acknowledgement, word)
        except (BusError, UnreachableError) as error:
            _log.info("the broker could not be told %r; the task comes again: %s", word[:4], error)


class Puller:
    """Takes what one consumer gives out, the tasks of a capability for one: at most ``concurrency`` at once.

    ``perform`` gets each delivery, in a task of the group in which :meth:`run` runs; its place is free again
    when it returns. ``announce`` is awaited when there is no queue yet, so that whoever makes queues hears of
    it; it waits for as long as it is wise to wait before pulling again.
    """

    def __init__(
        self,
        agent: SpiffeID,
        source: PullSource,
        *,
        keeper: Keeper,
        concurrency: int,
        perform: Callable[[Delivery], Awaitable[None]],
        announce: Callable[[Session], Coroutine[Any, Any, None]],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agent = agent
        self._stream, self._consumer, self._subject, self._takes = source
        self._keeper = keeper
        self._concurrency = concurrency
        self._worthwhile = max(1, concurrency // 4)  # so many are asked for at once, not each by itself
        self._perform = perform
        self._announce = announce
        self._monotonic = monotonic
        self._acknowledgements = Acknowledgements(keeper)
        self._running: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None
        self._changed = asyncio.Event()
        self._stopped = False
        self.ended = asyncio.Event()  # set when it has been stopped and nothing runs any more
        self._turns = Turns()
        # Of the connection that is pulled on now:
        self._inbox = ""
        self._asked = 0
        self._asked_until = 0.0
        self._no_queue = False

    @property
    def running(self) -> int:
        """How many deliveries are being worked on."""
        return len(self._running)

    async def run(self) -> None:
        """Pull until :meth:`stop`, over whatever connections there are; then wait for what runs."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            while not self._stopped:
                try:
                    await self._pull_on(await self._keeper.session(_EXPIRES_S))
                except UnreachableError:
                    _log.debug("no connection to pull on yet")
                except BusError as error:
                    _log.info("pulling from %s ends with its connection: %s", self._subject, error)
                    await asyncio.sleep(_AGAIN_S)
            self._group = None
        self.ended.set()

    def stop(self) -> None:
        """Take nothing more. What runs goes on."""
        self._stopped = True
        self._changed.set()

    @property
    def _free(self) -> int:
        return 0 if self._stopped else self._concurrency - len(self._running)

    @property
    def _missing(self) -> int:
        return self._free - self._asked

    async def _pull_on(self, session: Session) -> None:
        """Pull on one connection until it is retired or lost: whenever a good part of the places is free."""
        self._inbox = f"{pull_inbox(self._agent, session.instance)}.{secrets.token_hex(16)}"
        self._asked, self._no_queue = 0, False
        over = asyncio.ensure_future(session.until_over())
        unsubscribe = await session.receive_pulled(self._inbox, self._on_message)
        try:
            while session.usable and not self._stopped:
                if self._no_queue:
                    self._no_queue = False
                    await first_of(over, self._announce(session))
                    continue
                await self._ask(session)
                self._changed.clear()
                left = self._asked_until - self._monotonic() if self._asked else None
                await first_of(over, self._changed.wait(), timeout_s=left)
                if self._asked and self._monotonic() >= self._asked_until:
                    self._asked = 0  # the broker has not said how its requests ended
        finally:
            over.cancel()
            await unsubscribe()

    async def _ask(self, session: Session) -> None:
        missing = self._missing
        if missing < self._worthwhile:
            return
        request = {"batch": missing, "expires": int(_EXPIRES_S * _NANOSECONDS)}
        self._asked += missing
        self._asked_until = self._monotonic() + _EXPIRES_S + _LATE_S
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}"
        await session.publish(subject, json.dumps(request).encode(), self._inbox)

    async def _on_message(self, message: Msg) -> None:
        if message.subject == self._inbox:
            self._on_status(message)
            return
        if not self._takes(message.subject):
            return
        delivery = read_delivery(message, self._stream, self._consumer)
        if delivery is None:
            return
        self._asked = max(0, self._asked - 1)
        if self._free > 0 and self._group is not None:
            task = self._group.create_task(self._guarded(delivery))
            self._running.add(task)
            task.add_done_callback(self._ended)
            await self._turns.taken()
        else:
            await self._acknowledgements.back(delivery, 0)

    async def _guarded(self, delivery: Delivery) -> None:
        try:
            await self._perform(delivery)
        except Exception:  # noqa: BLE001 - the last boundary: one task must not stop the others
            _log.exception("a task ended in an error of the bus itself; it comes again")

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if self._stopped or self._missing >= self._worthwhile:
            self._changed.set()

    def _on_status(self, message: Msg) -> None:
        """Take note that a request has ended. Only the broker writes to this inbox by its own name."""
        headers = message.headers or {}
        status = headers.get("Status", "")
        if status in _NO_QUEUE:
            self._asked, self._no_queue = 0, True
        elif status in _ENDED:
            pending = headers.get("Nats-Pending-Messages", "")
            self._asked = max(0, self._asked - int(pending)) if pending.isdecimal() else 0
            self._no_queue |= status == "409" and "Consumer" in headers.get("Description", "")
        else:
            return
        self._changed.set()


def read_delivery(message: Msg, stream: str, consumer: str) -> Delivery | None:
    """Read where a delivery is acknowledged; ``None`` where that is not at the consumer that was asked."""
    tokens = message.reply.split(".")
    if len(tokens) >= _ACK_TOKENS_OF_ACCOUNT:
        del tokens[2:4]
    if len(tokens) < _ACK_TOKENS or tokens[:4] != ["$JS", "ACK", stream, consumer]:
        return None
    try:
        delivered, sequence, stored_ns = int(tokens[4]), int(tokens[5]), int(tokens[7])
    except ValueError:
        return None
    stored_ms = stored_ns // 1_000_000
    return Delivery(message.data, message.subject, delivered, stored_ms, message.reply, sequence)


async def first_of(
    ended: asyncio.Future[None], other: Coroutine[Any, Any, object], *, timeout_s: float | None = None
) -> None:
    """Wait for one of the two, or for ``timeout_s`` seconds."""
    waiting: asyncio.Future[Any] = asyncio.ensure_future(other)
    both: list[asyncio.Future[Any]] = [ended, waiting]
    try:
        await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
