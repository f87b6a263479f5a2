"""Hints: who waits for a task looks again when the broker has carried something about it, and not before.

What an agent records is published, and published things reach whoever listens. That is quick, but proves
nothing: it may be the record of a worker that lost, something forged, or come before it can be read. So a
hint wakes who waits for the task that its subject names, and its content is not even looked at. Without any
hint one looks every two seconds all the same; where more than a thousand tasks are waited for, more rarely,
so that a process asks at most 500 times a second.

Nothing is subscribed before somebody waits. What is kept is bounded by those who do.
"""

from __future__ import annotations

import asyncio
import logging
import random
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import nats.errors
from nats.aio.msg import Msg

from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.bus.subjects import progress_of_sender, records_of_sender
from agentweave_bus.exceptions import BusError, UnreachableError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["Hints", "Waiting"]

_log = logging.getLogger(__name__)

_POLL_S: Final = 2.0
_MOST_POLLS_A_SECOND: Final = 500

_AFTER_HINT_S: Final = (0.01, 0.05, 0.25)
"""When to look again after a look that a hint led to and that showed nothing: the broker passes a message on
before it has stored it."""

_KEY_TOKEN: Final = 6
_QUEUED_BYTES: Final = 4 * 1024 * 1024
"""Of hints that nobody has read yet; what is dropped is found by looking."""


class Waiting:
    """Somebody who waits for one task; given by :meth:`Hints.waiting`."""

    def __init__(self, hints: Hints) -> None:
        self._hints = hints
        self._hinted = asyncio.Event()
        self._soon: list[float] = []

    def hint(self) -> None:
        """Make the next look come at once."""
        self._hinted.set()

    def found(self) -> None:
        """Say that the last look showed something, so that no other one follows from the same hint."""
        self._soon.clear()

    async def next_look(self) -> None:
        """Return when it is time to look again."""
        # Once more: while another connection was being made, this one may have begun to wait on the old one.
        await self._hints.listen()
        pause = self._soon.pop(0) if self._soon else self._hints.poll_s()
        try:
            async with asyncio.timeout(pause):
                await self._hinted.wait()
        except TimeoutError:
            return
        self._hinted.clear()
        self._soon = list(_AFTER_HINT_S)


class Hints:
    """Hears what the broker carries about the tasks of ``me``, for as long as somebody waits.

    Make it before the keeper opens.
    """

    def __init__(self, *, me: SpiffeID, keeper: Keeper) -> None:
        self._keeper = keeper
        self._patterns = (records_of_sender(me), progress_of_sender(me))
        self._waiting: dict[str, set[Waiting]] = {}
        self._count = 0
        self._wanted = False
        self._hearing: weakref.WeakSet[Session] = weakref.WeakSet()
        keeper.on_session(self._on_session)

    @asynccontextmanager
    async def waiting(self, key: str) -> AsyncIterator[Waiting]:
        """Be woken by what is carried about the task ``key``, for the length of the block."""
        one = Waiting(self)
        self._waiting.setdefault(key, set()).add(one)
        self._count += 1
        try:
            await self.listen()
            yield one
        finally:
            self._count -= 1
            others = self._waiting[key]
            others.discard(one)
            if not others:
                del self._waiting[key]

    def poll_s(self) -> float:
        """How long to wait for a hint before looking without one; seconds."""
        return max(_POLL_S, self._count / _MOST_POLLS_A_SECOND) * random.uniform(0.9, 1.0)  # noqa: S311 - jitter

    async def listen(self) -> None:
        """Subscribe on the current session if need be; on those that follow it happens as they are made."""
        self._wanted = True
        try:
            await self._hear(await self._keeper.session(0.0))
        except UnreachableError:
            _log.debug("no connection to hear hints on yet")

    async def _on_session(self, session: Session) -> None:
        if self._wanted:
            await self._hear(session)

    async def _hear(self, session: Session) -> None:
        if session in self._hearing:
            return
        self._hearing.add(session)
        try:
            for pattern in self._patterns:
                await session.serve(pattern, "", self._on_message, _QUEUED_BYTES)
        except (BusError, nats.errors.Error) as error:
            self._hearing.discard(session)
            _log.debug("no hints from a connection that is going: %s", error)

    async def _on_message(self, message: Msg) -> None:
        tokens = message.subject.split(".", _KEY_TOKEN + 1)
        if len(tokens) > _KEY_TOKEN:
            for one in self._waiting.get(tokens[_KEY_TOKEN], ()):
                one.hint()
