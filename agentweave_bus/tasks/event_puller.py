"""Pulling the events of one publisher, or any consumer's messages: as many as can start at once, no more.

The consumer is asked for as many as there are free places, again whenever a good part of them is free.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

from nats.aio.msg import Msg

from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.pulling import (
    ENDED,
    EXPIRES_S,
    LATE_S,
    Puller,
    first_of,
    unguessable_inbox,
)
from agentweave_bus.tasks.queue import Delivery, read_delivery

__all__ = ["EventPuller", "PullSource"]


class PullSource(NamedTuple):
    """A consumer that is pulled from; ``subject`` is the pattern for what it gives out."""

    stream: str
    consumer: str
    subject: str
    takes: Callable[[str], bool]
    """Says whether something on a subject can come from there."""


class EventPuller(Puller):
    """Takes what one consumer gives out: at most ``concurrency`` at once."""

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
        super().__init__(
            agent,
            source.subject,
            keeper=keeper,
            concurrency=concurrency,
            perform=perform,
            announce=announce,
            monotonic=monotonic,
        )
        self._consumer = (source.stream, source.consumer)
        self._takes = source.takes
        # Of the connection that is pulled on now:
        self._inbox = ""
        self._asked = 0
        self._asked_until = 0.0

    @property
    def _missing(self) -> int:
        return self._free - self._asked

    def _is_worthwhile(self) -> bool:
        return self._missing >= self._worthwhile

    async def _pull_on(self, session: Session, over: asyncio.Future[None]) -> None:
        self._inbox = unguessable_inbox(self._agent, session)
        self._asked, self._no_queue = 0, False
        unsubscribe = await session.receive_pulled(self._inbox, self._on_message)
        try:
            while session.usable and not self._stopped:
                if self._no_queue:
                    self._no_queue = False
                    await first_of(over, self._announce(session))
                    continue
                self._changed.clear()
                await self._ask(session)
                left = self._asked_until - self._monotonic() if self._asked else None
                await first_of(over, self._changed.wait(), timeout_s=left)
                if self._asked and self._monotonic() >= self._asked_until:
                    self._asked = 0  # the broker has not said how its requests ended
        finally:
            await unsubscribe()

    async def _ask(self, session: Session) -> None:
        if not self._is_worthwhile():
            return
        missing = self._missing
        self._asked += missing
        self._asked_until = self._monotonic() + EXPIRES_S + LATE_S
        await self._request(session, self._consumer, self._inbox, missing)

    async def _on_message(self, message: Msg) -> None:
        if message.subject == self._inbox:
            self._on_status(message)
            return
        if not self._takes(message.subject):
            return
        given = read_delivery(message)
        if given is None or given[0] != self._consumer:
            return
        self._asked = max(0, self._asked - 1)
        await self._take(given[1])

    def _on_status(self, message: Msg) -> None:
        """Take note that a request has ended. Only the broker writes to this inbox by its own name."""
        headers = message.headers or {}
        status = headers.get("Status", "")
        if status == "503":
            self._asked, self._no_queue = 0, True
        elif status in ENDED:
            pending = headers.get("Nats-Pending-Messages", "")
            self._asked = max(0, self._asked - int(pending)) if pending.isdecimal() else 0
            self._no_queue |= status == "409" and "Consumer" in headers.get("Description", "")
        else:
            return
        self._changed.set()
