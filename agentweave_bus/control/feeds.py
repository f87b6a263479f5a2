"""What the control role pulls: many consumers over one subscription, a bounded number of messages at once.

A worker pulls from a few queues, and has an inbox for each. The control role pulls from one consumer for each
agent that serves durable tasks, so here all answers come to one inbox pattern: a connection has room for a
thousand subscriptions, and there may be more agents than that. Which consumer gave out a message is said by
the subject on which it is acknowledged, and what any other gave out is not looked at.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from nats.aio.msg import Msg

from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.bus.streams import ConsumerSpec
from agentweave_bus.bus.subjects import pull_inbox
from agentweave_bus.exceptions import BusError, UnreachableError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.pulling import EXPIRES_S, LATE_S, first_of, request_next
from agentweave_bus.tasks.queue import Delivery, read_delivery

__all__ = ["Feeds"]

_log = logging.getLogger(__name__)

_AGAIN_S: Final = 0.05  # a connection that was lost just now may not be known as such yet
_BATCH: Final = 16
_MOST_AT_ONCE: Final = 64
_SESSION_S: Final = 30.0
_NO_CONSUMER_S: Final = 2.0
"""When to ask again where there is no consumer, or none any more."""


@dataclass(slots=True)
class _Feed:
    """A consumer that is pulled from: how many messages are asked for, by when that is over."""

    consumer: ConsumerSpec
    inbox: str = ""
    asked: int = 0
    until: float = 0.0


class Feeds:
    """Pulls from every consumer that was added, and hands on what comes, with the name of its stream.

    ``take`` runs in a task of its own for each delivery, and deals with all that goes wrong. What it does not
    acknowledge comes again.
    """

    def __init__(
        self,
        me: SpiffeID,
        keeper: Keeper,
        take: Callable[[str, Delivery], Awaitable[None]],
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._keeper = keeper
        self._take = take
        self._monotonic = monotonic
        self._feeds: dict[tuple[str, str], _Feed] = {}
        self._inboxes: dict[str, _Feed] = {}
        self._changed = asyncio.Event()
        self._places = asyncio.Semaphore(_MOST_AT_ONCE)
        self._group: asyncio.TaskGroup | None = None

    def add(self, consumer: ConsumerSpec) -> None:
        """Pull from a consumer from now on; adding it twice does no harm."""
        key = (consumer.stream, consumer.name)
        if key not in self._feeds:
            self._feeds[key] = _Feed(consumer)
            self._changed.set()

    async def run(self) -> None:
        """Pull until cancelled, on whatever connections there are. The caller owns this task."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            while True:
                try:
                    await self._pull_while_usable(await self._keeper.session(_SESSION_S))
                except UnreachableError:
                    _log.debug("no connection to pull on yet")

    async def _pull_while_usable(self, session: Session) -> None:
        over = asyncio.ensure_future(session.until_over())
        try:
            await self._pull_on(session, over)
        except BusError as error:
            _log.info("pulling ends with its connection: %s", error)
            await asyncio.wait([over], timeout=_AGAIN_S)
        finally:
            over.cancel()

    async def _pull_on(self, session: Session, over: asyncio.Future[None]) -> None:
        prefix = pull_inbox(self._me, session.instance)
        self._inboxes.clear()
        for feed in self._feeds.values():
            feed.inbox = ""
        unsubscribe = await session.receive_pulled(f"{prefix}.*", self._on_message)
        try:
            while session.usable:
                self._changed.clear()
                due = await self._ask_all(session, prefix)
                await first_of(over, self._changed.wait(), timeout_s=max(0.01, due - self._monotonic()))
        finally:
            await unsubscribe()

    async def _ask_all(self, session: Session, prefix: str) -> float:
        """Ask every consumer of which nothing is expected; return when to look again."""
        now, due = self._monotonic(), self._monotonic() + EXPIRES_S
        for feed in list(self._feeds.values()):
            if not feed.inbox:
                feed.inbox = f"{prefix}.{secrets.token_hex(16)}"
                self._inboxes[feed.inbox] = feed
                feed.asked, feed.until = 0, now
            if now >= feed.until:
                feed.asked, feed.until = _BATCH, now + EXPIRES_S + LATE_S
                await request_next(session, (feed.consumer.stream, feed.consumer.name), feed.inbox, _BATCH)
            due = min(due, feed.until)
        return due

    async def _on_message(self, message: Msg) -> None:
        if (feed := self._inboxes.get(message.subject)) is not None:
            self._on_status(feed, (message.headers or {}).get("Status", ""))
            return
        given = read_delivery(message)
        if given is None or (feed := self._feeds.get(given[0])) is None or self._group is None:
            return
        feed.asked -= 1
        if feed.asked <= 0:
            self._again(feed, 0)
        await self._places.acquire()  # what comes meanwhile waits in the subscription
        self._group.create_task(self._guarded(feed.consumer.stream, given[1]))

    async def _guarded(self, stream: str, delivery: Delivery) -> None:
        try:
            await self._take(stream, delivery)
        except Exception:  # noqa: BLE001 - the last boundary: one message must not stop the others
            _log.exception("a parked task ended in an error of the bus itself; it comes again")
        finally:
            self._places.release()

    def _on_status(self, feed: _Feed, status: str) -> None:
        if status == "408":
            self._again(feed, 0)
        elif status:
            self._again(feed, _NO_CONSUMER_S)

    def _again(self, feed: _Feed, pause_s: float) -> None:
        feed.asked, feed.until = 0, self._monotonic() + pause_s
        self._changed.set()
