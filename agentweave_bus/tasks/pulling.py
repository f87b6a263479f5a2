"""Taking from queues as many deliveries as can be worked on at once, over whatever connections there are.

What a puller asks for and when is its own; that each delivery has a place, runs in a task with an owner, and
that pulling goes on after a lost connection, is the same for all and stands here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any, Final

import anyio

from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.bus.subjects import pull_inbox
from agentweave_bus.bus.turns import Turns
from agentweave_bus.exceptions import BusError, UnreachableError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.queue import Acknowledgements, Delivery

__all__ = [
    "ENDED",
    "EXPIRES_S",
    "LATE_S",
    "Puller",
    "drained",
    "first_of",
    "request_next",
    "unguessable_inbox",
]

_log = logging.getLogger(__name__)

EXPIRES_S: Final = 30.0
"""How long a request waits at the broker."""
LATE_S: Final = 5.0
"""How long after the end of a request its status may still come. Then the request counts as lost."""

ENDED: Final = frozenset({"404", "408", "409"})
"""The statuses by which the broker ends a request."""

_PART_FOR_ENDING: Final = 0.9
"""Of the time for draining. What is given back needs the rest."""

_AGAIN_S: Final = 0.05  # a connection that was lost just now may not be known as such yet
_NANOSECONDS: Final = 1_000_000_000


class Puller(ABC):
    """Pulls at most ``concurrency`` deliveries at once, and has ``perform`` work on each.

    Each runs in a task of the group in which :meth:`run` runs; its place is free again when ``perform``
    returns. ``name`` is what the log calls that which is pulled. ``announce`` is awaited when there is
    nothing to pull from yet, so that whoever makes queues hears of it; it waits for as long as it is wise to
    wait before pulling again.
    """

    def __init__(
        self,
        agent: SpiffeID,
        name: str,
        *,
        keeper: Keeper,
        concurrency: int,
        perform: Callable[[Delivery], Awaitable[None]],
        announce: Callable[[Session], Coroutine[Any, Any, None]],
        monotonic: Callable[[], float],
    ) -> None:
        self._agent = agent
        self._name = name
        self._keeper = keeper
        self._announce = announce
        self._monotonic = monotonic
        self._no_queue = False
        self._concurrency = concurrency
        self._worthwhile = max(1, concurrency // 4)  # so many are asked for at once, not each by itself
        self._perform = perform
        self._acknowledgements = Acknowledgements(keeper)
        self._running: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None
        self._changed = asyncio.Event()
        self._stopped = False
        self._connecting = anyio.CancelScope()
        self.ended = asyncio.Event()  # set when it has been stopped and nothing runs any more
        self._turns = Turns()
        self._asked_at = monotonic()

    @property
    def idle_s(self) -> float | None:
        """For how many seconds nothing was asked for although there is room; else ``None``. Thread-safe."""
        if self._free < self._worthwhile:
            return None
        return self._monotonic() - self._asked_at

    @property
    def running(self) -> int:
        """How many deliveries are being worked on."""
        return len(self._running)

    async def run(self) -> None:
        """Pull until :meth:`stop`, over whatever connections there are; then wait for what runs."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            while not self._stopped:
                if (session := await self._connected()) is not None:
                    await self._pull_while_usable(session)
            self._group = None
        self.ended.set()

    def stop(self) -> None:
        """Take nothing more. What runs goes on."""
        self._stopped = True
        self._changed.set()
        self._connecting.cancel()

    def give_back(self) -> None:
        """Cancel what runs; whoever works on it gives it back."""
        for task in self._running:
            task.cancel()

    async def _connected(self) -> Session | None:
        """Wait for a connection, as long as a request may; ``None`` without one, and at once when stopped."""
        with anyio.CancelScope() as self._connecting:
            try:
                return await self._keeper.session(EXPIRES_S)
            except UnreachableError:
                _log.debug("no connection to pull on yet")
        return None

    async def _pull_while_usable(self, session: Session) -> None:
        self._asked_at = self._monotonic()
        over = asyncio.ensure_future(session.until_over())
        try:
            await self._pull_on(session, over)
        except BusError as error:
            _log.info("pulling %s ends with its connection: %s", self._name, error)
            await asyncio.wait([over], timeout=_AGAIN_S)
        finally:
            over.cancel()

    @abstractmethod
    async def _pull_on(self, session: Session, over: asyncio.Future[None]) -> None:
        """Pull on one connection until it is retired or lost; then ``over`` is done."""

    async def _request(
        self, session: Session, consumer: tuple[str, str], inbox: str, batch: int, *, wait: bool = True
    ) -> None:
        self._asked_at = self._monotonic()
        await request_next(session, consumer, inbox, batch, wait=wait)

    @property
    def _free(self) -> int:
        return 0 if self._stopped else self._concurrency - len(self._running)

    async def _take(self, delivery: Delivery, begun: Callable[[], None] = lambda: None) -> None:
        """Have a delivery worked on, and call ``begun``; if there is no place for it, give it back."""
        if self._free <= 0 or self._group is None:
            await self._acknowledgements.back(delivery, 0)
            return
        begun()
        task = self._group.create_task(self._guarded(delivery))
        self._running.add(task)
        task.add_done_callback(self._ended)
        await self._turns.taken()

    async def _guarded(self, delivery: Delivery) -> None:
        try:
            await self._perform(delivery)
        except Exception:  # noqa: BLE001 - the last boundary: one delivery must not stop the others
            _log.exception("a task ended in an error of the bus itself; it comes again")

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if self._free == self._worthwhile:
            self._asked_at = self._monotonic()  # from now on there is room
        if self._stopped or self._is_worthwhile():
            self._changed.set()

    def _is_worthwhile(self) -> bool:
        """Say whether so many places are free that more should be asked for."""
        return True


def unguessable_inbox(agent: SpiffeID, session: Session) -> str:
    """Return an inbox for what a queue gives out, on one connection, that nobody can guess."""
    return f"{pull_inbox(agent, session.instance)}.{secrets.token_hex(16)}"


async def request_next(
    session: Session, consumer: tuple[str, str], inbox: str, batch: int, *, wait: bool = True
) -> None:
    """Ask a consumer, by the names of its stream and its own, for ``batch`` messages.

    It answers at once with what it has, or with ``wait`` within :data:`EXPIRES_S` seconds.

    Raises:
        BusError: the connection is lost.

    """
    request: dict[str, Any] = {"batch": batch}
    request |= {"expires": int(EXPIRES_S * _NANOSECONDS)} if wait else {"no_wait": True}
    stream, name = consumer
    await session.publish(f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{name}", json.dumps(request).encode(), inbox)


async def drained(pullers: Collection[Puller], drain_timeout_s: float, what: str) -> None:
    """Have nothing more taken, and return when what runs has ended.

    What has not ended after nine tenths of ``drain_timeout_s`` seconds is given back, while there is a
    connection to say so: another worker begins it at once. ``what`` is what the log calls that.
    """
    for puller in pullers:
        puller.stop()
    grace_s = _PART_FOR_ENDING * drain_timeout_s
    with anyio.move_on_after(grace_s):
        for puller in pullers:
            await puller.ended.wait()
    if left := sum(puller.running for puller in pullers):
        _log.warning("%d %s have not ended in %g s and are given back", left, what, grace_s)
        for puller in pullers:
            puller.give_back()
    for puller in pullers:
        await puller.ended.wait()


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
