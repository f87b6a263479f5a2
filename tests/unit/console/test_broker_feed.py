"""Asking the control role again and again: where it goes on, and what it says when it can't.

A control role that is played tells what was asked for, which the page does not show.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from agentweave_bus.console import broker_feed
from agentweave_bus.console.broker_feed import BrokerFeed
from agentweave_bus.console.model import ConsoleModel
from agentweave_bus.console.watched import Watched
from agentweave_bus.exceptions import AuthorizationError, UnreachableError, WorkloadApiUnavailableError

pytestmark = pytest.mark.anyio

ECHO = "spiffe://demo.test/agent/echo"
ME = "spiffe://demo.test/client/operator"


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_AGAIN_S", "_NO_NEWS_S", "_RECORDS_S"):
        monkeypatch.setattr(broker_feed, name, 0.05)


class Control:
    """Answers in turn with what it was given: a page, or an error."""

    connected = True

    def __init__(self, *turns: Any) -> None:
        self.turns = list(turns)
        self.asked: list[Any] = []
        self.letters: Any = {"letters": [], "after": None}

    async def observe_queues(self) -> dict[str, Any]:
        return {"queues": [], "parked": [], "letters": [{"agent": ECHO, "count": 1}]}

    async def observe_records(self, after: Any = None, *, limit: int = 200) -> dict[str, Any]:
        self.asked.append(after)
        turn = self.turns.pop(0) if self.turns else page(len(self.asked))
        if isinstance(turn, Exception):
            raise turn
        return turn  # type: ignore[no-any-return]

    async def list(self, agent: Any = None, **_: Any) -> dict[str, Any]:
        if isinstance(self.letters, Exception):
            raise self.letters
        return self.letters  # type: ignore[no-any-return]


def page(number: int, *, more: bool = False, **told: Any) -> dict[str, Any]:
    return {"records": [], "after": {ECHO: number}, "more": more} | told


async def follow(control: Control, until: Callable[[ConsoleModel], bool], fails: int = 0) -> ConsoleModel:
    """Follow a control role until something holds; the first ``fails`` connections come to nothing."""
    model, watched = ConsoleModel(trust_domain="demo.test", clock_ms=lambda: 1), Watched()
    left = [fails]

    @asynccontextmanager
    async def connect() -> AsyncIterator[Any]:
        left[0] -= 1
        if left[0] >= 0:
            raise WorkloadApiUnavailableError("nobody there")
        yield control

    feed = BrokerFeed(model, connect, watched, me=ME, control="spiffe://demo.test/agentweave/control")
    with watched.look():
        task = asyncio.create_task(feed.run())
        async with asyncio.timeout(30):
            while not until(model):  # noqa: ASYNC110 - a model tells nobody
                await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    with pytest.raises(UnreachableError):
        _ = feed.calls
    return model


async def test_it_goes_on_where_it_was_also_behind_an_error() -> None:
    control = Control(
        page(1, more=True), page(2, more=True), UnreachableError("gone"), page(4, more=True), page(5)
    )
    await follow(control, lambda _: len(control.asked) >= 5)
    assert control.asked[:5] == [None, {ECHO: 1}, {ECHO: 2}, {ECHO: 2}, {ECHO: 4}]


async def test_an_answer_that_is_not_understood_is_told_and_left() -> None:
    control = Control(page(1, more=True), page(2, records=[{"state": "sideways"}]))
    model = await follow(control, lambda model: "not understood" in model.health("broker").why)
    assert "sideways" not in model.health("broker").why
    assert control.asked[1] == {ECHO: 1}


async def test_a_connection_that_is_not_made_is_tried_again() -> None:
    control = Control()
    seen: list[str] = []

    def well(model: ConsoleModel) -> bool:
        seen.append(model.health("broker").why)
        return model.health("broker").ok

    await follow(control, well, fails=1)
    assert "nobody there" in seen


async def test_dead_letters_may_be_kept_from_who_may_observe() -> None:
    control = Control()
    control.letters = AuthorizationError("no entry of operators lets it")
    model = await follow(control, lambda model: bool(model.sections()["letters_why"]))
    assert "control:redrive" in model.sections()["letters_why"]


async def test_without_a_connection_nothing_is_asked() -> None:
    control = Control()
    control.connected = False
    model = await follow(control, lambda model: "no connection" in model.health("broker").why)
    assert control.asked == []
    assert not model.health("broker").ok
