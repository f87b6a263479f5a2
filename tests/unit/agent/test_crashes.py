"""The worker dies at each operation of the store in turn, and at two of them: nothing paid for runs again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentweave_bus.agent import current_context
from agentweave_bus.agent.steps import MOST_PASSES
from agentweave_bus.exceptions import RetryableError, TaskFailedError
from tests.unit.agent.step_store import MemoryStore, attempt, perform, step


@dataclass(frozen=True)
class Part:
    """One step of a handler: how its function and its compensation end, and how often they fail before."""

    undoable: bool = True
    declined: bool = False  # its function fails for good, which the handler catches
    busy: int = 0  # how often its function is to be tried again first
    stubborn: int = 0  # how often its compensation fails first


class Story:
    """A handler made of parts, and a note of every function that runs, with what was recorded by then."""

    def __init__(self, parts: list[Part], end: Exception | None, store: MemoryStore) -> None:
        self.parts, self.end, self.store = parts, end, store
        self.busy = [part.busy for part in parts]
        self.stubborn = [part.stubborn for part in parts]
        self.ran: list[str] = []
        self.undone: list[str] = []
        self.wrong: list[str] = []

    def expect(self, holds: bool, what: str) -> None:
        """Note that it does not: an exception in here would only fail the step."""
        if not holds:
            self.wrong.append(what)

    def handler(self) -> Callable[[], Any]:
        async def handler() -> Any:
            return await self._run()

        return handler

    async def _run(self) -> Any:
        for number, part in enumerate(self.parts):
            try:
                await self._step(number, part)
            except TaskFailedError:
                self.ran.append("caught")
        if self.end is not None:
            raise self.end
        return "done"

    async def _step(self, number: int, part: Part) -> None:
        async def undo(value: Any) -> None:
            self.expect(value == number, "its compensation got another value")
            self.expect(f"undo:s{number}" not in self.store.texts, f"s{number} was undone twice")
            if self.stubborn[number]:
                self.stubborn[number] -= 1
                raise OSError("stubborn")
            self.undone.append(f"s{number}")

        def function() -> int:
            self.expect(f"s{number}" not in self.store.texts, f"s{number} is recorded and ran again")
            self.ran.append(f"s{number}")
            if self.busy[number]:
                self.busy[number] -= 1
                raise RetryableError("busy")
            if part.declined:
                raise TaskFailedError("declined")
            return number

        async def in_loop() -> int:
            return function()

        await step(f"s{number}", in_loop, compensate=undo if part.undoable else None)

    def check(self, outcome: Any, crashes: int) -> None:
        assert self.wrong == []
        store, names = self.store, [f"s{n}" for n in range(len(self.parts))]
        undoable = [n for n in names if self.parts[int(n[1:])].undoable and n in store.values()]
        for number, name in enumerate(names):
            runs = self.ran.count(name)
            assert runs <= 1 + crashes + self.parts[number].busy
        if outcome.result.status == "completed":
            assert self.undone == []
            assert not any(":" in name and not name.startswith("saga:") for name in store.texts)
            return
        # In reverse, and exactly what was recorded; a crash between undoing and its record repeats the one.
        once = [name for n, name in enumerate(self.undone) if name not in self.undone[:n]]
        left = [name for name in undoable if f"{name!r} failed" in outcome.result.error]
        assert set(once) | set(left) == set(undoable)
        assert once == [name for name in reversed(undoable) if name in once]
        assert len(self.undone) - len(once) <= crashes
        if not any(part.stubborn for part in self.parts):
            assert left == []


async def _play(parts: list[Part], end: Exception | None, crashes: tuple[int, ...]) -> MemoryStore:
    store = MemoryStore(*crashes)
    story = Story(parts, end, store)
    outcome = await perform(story.handler(), store)
    assert not outcome.retry
    story.check(outcome, len(crashes))
    return store


def play(parts: list[Part], end: Exception | None, *crashes: int) -> MemoryStore:
    return anyio.run(_play, parts, end, crashes)


SHOP = [Part(), Part(undoable=False), Part(declined=True), Part(busy=1), Part()]


@pytest.mark.parametrize("end", [None, TaskFailedError("no"), RetryableError("later"), OSError("bug")])
def test_a_crash_before_or_after_each_operation(end: Exception | None) -> None:
    most = play(SHOP, end).operations
    assert most > 15
    for number in range(1, most + 1):
        play(SHOP, end, number)
        play(SHOP, end, -number)


def test_a_crash_at_each_operation_while_compensations_fail_and_are_tried_again() -> None:
    parts = [Part(), Part(stubborn=2), Part()]
    for number in range(1, play(parts, TaskFailedError("no")).operations + 1):
        play(parts, TaskFailedError("no"), number)
        play(parts, TaskFailedError("no"), -number)


def test_a_worker_that_dies_in_every_pass_is_not_asked_for_ever() -> None:
    class Deadly(MemoryStore):
        async def save(self, name: str, record: Any) -> Any:
            if name.startswith("undo:"):
                self.crashes.append(-self.operations - 1)
            return await super().save(name, record)

    store = Deadly()
    story = Story([Part()], TaskFailedError("no"), store)
    outcome = anyio.run(perform, story.handler(), store)
    assert story.undone == ["s0"] * MOST_PASSES
    assert "the compensation of step 's0' failed" in outcome.result.error


class Killed(KeyboardInterrupt):
    """The process ends in the midst of the handler: nothing in it catches that."""


def test_a_worker_that_dies_in_every_replay_is_not_asked_for_ever() -> None:
    deaths = []

    async def handler() -> None:
        if current_context().attempt > 1:
            deaths.append(current_context().attempt)
            raise Killed
        await step("s0", int, compensate=print)
        raise RetryableError

    async def main() -> Any:
        store = MemoryStore()
        await attempt(handler, store)
        for number in range(2, 40):
            try:
                return await perform(handler, store, attempts=3, first=number)
            except Killed:
                continue
        return None

    outcome = anyio.run(main)
    assert len(deaths) == 2 + MOST_PASSES, "two attempts, and then the replays"
    assert "the compensation of step 's0' failed" in outcome.result.error


parts = st.builds(
    Part,
    undoable=st.booleans(),
    declined=st.booleans(),
    busy=st.sampled_from([0, 0, 0, 1, 2]),
    stubborn=st.sampled_from([0, 0, 0, 1, MOST_PASSES]),
)
ends = st.sampled_from([None, TaskFailedError("no"), RetryableError("later"), OSError("bug")])
points = st.integers(1, 60).flatmap(lambda n: st.sampled_from([n, -n]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(parts, max_size=5), ends, st.lists(points, max_size=4, unique=True))
def test_crashes_anywhere(parts: list[Part], end: Exception | None, crashes: list[int]) -> None:
    play(parts, end, *crashes)
