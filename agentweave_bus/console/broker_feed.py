"""What the control role tells of tasks and queues: asked again and again, as the operator's identity.

A broker that goes away and comes back is the connection's business; here it is a call that fails for a while.
The place up to which records were read is kept, so that none is missed and none is counted twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, NamedTuple, Protocol

from agentweave_bus.authz import Grants
from agentweave_bus.console.model import ConsoleModel
from agentweave_bus.console.observed import LetterCount, Queues, read_page, read_queues
from agentweave_bus.console.watched import Watched
from agentweave_bus.exceptions import AgentWeaveError, AuthorizationError, UnreachableError
from agentweave_bus.tasks.handle import TaskHandle
from agentweave_bus.tasks.operator_acts import OBSERVE_ACT, REDRIVE_ACT
from agentweave_bus.tasks.status import TaskStatus

__all__ = ["BrokerCalls", "BrokerFeed", "Connect"]

_log = logging.getLogger(__name__)

_PAGE: Final = 200
_CALL_S: Final = 3.0
_QUEUES_S: Final = 1.0
_LETTERS_S: Final = 5.0
_RECORDS_S: Final = 0.5
_NO_NEWS_S: Final = 1.0
_UNWATCHED_S: Final = 5.0
_AGAIN_S: Final = 1.0
_MOST_LETTERS: Final = 50


class BrokerCalls(Protocol):
    """What the console asks of the control role; ``runtime.operators`` has it."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection to the broker now."""

    async def observe_queues(self) -> dict[str, Any]:
        """Return what waits in the queues of all agents."""

    async def observe_records(
        self, after: dict[str, int] | None = None, *, limit: int = 200
    ) -> dict[str, Any]:
        """Return the records behind a place, near the end of each stream where none is given."""

    async def observe_task(self, agent: str, sender: str, key: str) -> dict[str, Any]:
        """Return all that is recorded of a task."""

    async def list(
        self, agent: str | None = None, *, limit: int = 50, after: str | None = None
    ) -> dict[str, Any]:
        """Return dead letters."""

    async def redrive(self, letter: str) -> dict[str, Any]:
        """Have the task in a dead letter begin anew."""

    async def drop(self, letter: str, *, reason: str = "") -> dict[str, Any]:
        """Put on record that a dead letter is dealt with."""

    async def cancel(self, reference: str, reason: str = "", *, timeout: float) -> TaskStatus:  # noqa: ASYNC109
        """Have a task cancelled, whosever it is; return how it ended."""

    def task(self, reference: str) -> TaskHandle:
        """Return the handle of a task."""


Connect = Callable[[], AbstractAsyncContextManager[BrokerCalls]]
"""Connects as the operator, for the length of a block."""


class _Found(NamedTuple):
    """How many records a look found, and whether there are more."""

    records: int
    more: bool


class BrokerFeed:
    """Holds one connection, and another when that has failed.

    ``me`` is the operator, ``control`` whom it asks.
    """

    def __init__(
        self, model: ConsoleModel, connect: Connect, watched: Watched, *, me: str, control: str
    ) -> None:
        self._model = model
        self._connect = connect
        self._watched = watched
        self._me = me
        self._control = control
        self._calls: BrokerCalls | None = None
        self._after: dict[str, int] | None = None
        self._letters: tuple[LetterCount, ...] = ()
        self._letters_at = self._queues_at = float("-inf")

    @property
    def calls(self) -> BrokerCalls:
        """The connection that there is. Raises UnreachableError where there is none."""
        if self._calls is None:
            raise UnreachableError(self._model.health("broker").why or "the broker is not connected")
        return self._calls

    async def run(self) -> None:
        """Connect and ask until cancelled."""
        while True:
            try:
                async with self._connect() as calls:
                    self._calls = calls
                    await self._follow(calls)
            except AgentWeaveError as error:
                self._failed(error)
            except BaseExceptionGroup as group:
                known, other = group.split(AgentWeaveError)
                if other is not None:
                    raise other from None
                self._failed(_first(known or group))
            finally:
                self._calls = None
            await asyncio.sleep(_AGAIN_S)

    async def _follow(self, calls: BrokerCalls) -> None:
        while True:
            found = _Found(0, more=False)
            try:
                async with asyncio.timeout(_CALL_S):
                    found = await self._look(calls)
            except AgentWeaveError as error:
                self._failed(error)
            except TimeoutError:
                self._model.source_failed("broker", f"the control role does not answer within {_CALL_S:g} s")
            else:
                self._model.source_well("broker")
            if not found.more:
                seconds = _RECORDS_S if found.records else _NO_NEWS_S
                await self._watched.pause(seconds, unwatched_s=_UNWATCHED_S)

    async def _look(self, calls: BrokerCalls) -> _Found:
        if not calls.connected:  # a call would wait for that, and the page with it
            raise UnreachableError("there is no connection to the broker")
        now = time.monotonic()
        if now >= self._queues_at + _QUEUES_S:
            queues = read_queues(await calls.observe_queues())
            self._model.set_queues(queues)
            self._queues_at = now
            await self._look_at_letters(calls, queues)
        page = read_page(await calls.observe_records(self._after, limit=_PAGE))
        self._model.add_records(page.records)
        self._after = page.after
        return _Found(len(page.records), page.more)

    async def _look_at_letters(self, calls: BrokerCalls, queues: Queues) -> None:
        """Have the dead letters listed now and then; whoever may observe need not be let do that."""
        now = time.monotonic()
        if queues.letters == self._letters and now < self._letters_at + _LETTERS_S:
            return
        self._letters, self._letters_at = queues.letters, now
        if not any(one.count for one in queues.letters):
            self._model.set_letters((), more=False)
            return
        try:
            told = await calls.list(limit=_MOST_LETTERS)
        except AuthorizationError as error:
            self._model.set_letters((), more=False, why=self._denied(error, REDRIVE_ACT))
            return
        self._model.set_letters(told["letters"], more=told["after"] is not None)

    def _denied(self, error: AuthorizationError, act: str) -> str:
        grant = Grants().explain(self._me, self._control, act).rstrip()
        return f"{error}\nThis in the grants would allow it:\n{grant}"

    def _failed(self, error: BaseException) -> None:
        why = str(error) or type(error).__name__
        if isinstance(error, AuthorizationError):
            why = self._denied(error, OBSERVE_ACT)
        self._model.source_failed("broker", why)
        _log.debug("the broker tells nothing: %s", why)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
