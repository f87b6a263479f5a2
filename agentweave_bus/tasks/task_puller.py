"""Pulling the tasks of one capability: the urgent ones first, and none of them never.

A capability has a queue for each priority. When places are free the puller asks the queues one after the
other, the most urgent first, for as many tasks as there are places, and each says at once what it has. So as
long as there is an urgent task no other one begins. But whenever 16 tasks have gone before those that wait in
a slower queue, one of these has its turn.

A queue that has nothing is left with a request that waits there, until something comes: for one task, and at
the queue of normal ones for as many as take a quarter of the places. It may be answered when the last place
has just been taken. What comes then is given back at once, and is the next that its queue gives out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, Final

from nats.aio.msg import Msg

from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.bus.streams import task_consumer
from agentweave_bus.bus.subjects import Priority, task_subject
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

__all__ = ["MOST_PASSED", "TaskPuller"]

MOST_PASSED: Final = 16
"""How many more urgent tasks go before those of a slower queue, until one of these has its turn."""


class _Queue:
    """One queue, and what it was asked for on the present connection.

    ``left`` is how many tasks may still come for the request that is open there, ``until`` when that is over.
    A request that ``waits`` stays open until something comes; while it is open the queue is empty.
    """

    def __init__(self, agent: SpiffeID, capability: str, priority: Priority) -> None:
        consumer = task_consumer(agent, capability, priority)
        self.consumer = (consumer.stream, consumer.name)
        self.subject = task_subject(agent, capability, priority)
        self.priority = priority
        self.inbox = ""
        self.left = 0
        self.until = 0.0
        self.waits = False
        self.empty = False
        self.passed = 0

    def begin(self, inbox: str) -> None:
        """Begin anew on another connection."""
        self.inbox = inbox
        self.over()
        self.empty = False

    def over(self) -> None:
        """Expect nothing more of the request that is open."""
        self.left, self.waits = 0, False


class TaskPuller(Puller):
    """Takes the tasks of one capability, for at most ``concurrency`` at once."""

    def __init__(
        self,
        agent: SpiffeID,
        capability: str,
        *,
        keeper: Keeper,
        concurrency: int,
        perform: Callable[[Delivery], Awaitable[None]],
        announce: Callable[[Session], Coroutine[Any, Any, None]],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            agent,
            capability,
            keeper=keeper,
            concurrency=concurrency,
            perform=perform,
            announce=announce,
            monotonic=monotonic,
        )
        self._queues = [_Queue(agent, capability, priority) for priority in Priority]

    # --- asking ------------------------------------------------------------------------------------------

    async def _pull_on(self, session: Session, over: asyncio.Future[None]) -> None:
        self._no_queue = False
        async with self._inboxes(session):
            while session.usable and not self._stopped:
                if self._no_queue:
                    self._no_queue = False
                    await first_of(over, self._announce(session))
                    continue
                self._changed.clear()
                await self._ask(session)
                await first_of(over, self._changed.wait(), timeout_s=self._patience())

    @asynccontextmanager
    async def _inboxes(self, session: Session) -> AsyncIterator[None]:
        """Subscribe to an inbox for each queue that nobody can guess."""
        async with AsyncExitStack() as stack:
            for queue in self._queues:
                queue.begin(unguessable_inbox(self._agent, session))
                end = await session.receive_pulled(queue.inbox, partial(self._on_message, queue))
                stack.push_async_callback(end)
            yield

    def _patience(self) -> float | None:
        """How long to wait for a request to end; ``None`` where none is open."""
        now = self._monotonic()
        return min((max(0.0, one.until - now) for one in self._queues if one.left), default=None)

    async def _ask(self, session: Session) -> None:
        """Ask the next queue whose turn it is, if there are places and no other is being asked."""
        now = self._monotonic()
        for queue in self._queues:
            if queue.left and now >= queue.until:
                queue.over()  # the broker has not said how it ended
        if any(queue.left and not queue.waits for queue in self._queues):
            return
        free = self._free
        if free < self._worthwhile:
            return
        for queue in self._in_turn():
            if queue.empty or queue.waits:
                continue
            batch = 1 if queue.passed >= MOST_PASSED else free
            await self._ask_queue(session, queue, batch, wait=False)
            return
        for queue in self._queues:
            queue.empty = False
            if not queue.waits:
                batch = max(1, free // 4) if queue.priority is Priority.NORMAL else 1
                await self._ask_queue(session, queue, batch, wait=True)

    def _in_turn(self) -> list[_Queue]:
        """Return the queues, those first that were passed over for long, then the most urgent."""
        return sorted(self._queues, key=lambda queue: queue.passed < MOST_PASSED)

    async def _ask_queue(self, session: Session, queue: _Queue, batch: int, *, wait: bool) -> None:
        queue.left, queue.waits = batch, wait
        queue.until = self._monotonic() + LATE_S + (EXPIRES_S if wait else 0.0)
        await self._request(session, queue.consumer, queue.inbox, batch, wait=wait)

    # --- what comes --------------------------------------------------------------------------------------

    async def _on_message(self, queue: _Queue, message: Msg) -> None:
        if message.subject == queue.inbox:
            self._on_status(queue, message)
            return
        if message.subject != queue.subject:
            return
        given = read_delivery(message)
        if given is None or given[0] != queue.consumer:
            return
        queue.left = max(0, queue.left - 1)
        if not queue.left:
            self._answered(queue)
        await self._take(given[1], partial(self._count, queue))

    def _answered(self, queue: _Queue) -> None:
        """Take note that a queue has given all that it was asked for: it may have more, as may the others."""
        queue.over()
        for one in self._queues:
            one.empty = False
        self._changed.set()

    def _count(self, begun: _Queue) -> None:
        """Take note of whom a task that begins goes before."""
        begun.passed = 0
        for queue in self._queues[self._queues.index(begun) + 1 :]:
            queue.passed = 0 if queue.waits else queue.passed + 1

    def _on_status(self, queue: _Queue, message: Msg) -> None:
        """Take note that a request has ended. Only the broker writes to this inbox by its own name."""
        headers = message.headers or {}
        status = headers.get("Status", "")
        if status == "503":
            self._no_queue = True
        elif status in ENDED:
            queue.empty = not queue.waits
            self._no_queue |= status == "409" and "Consumer" in headers.get("Description", "")
        else:
            return
        queue.over()
        self._changed.set()
