"""Compensations: what was recorded is undone, last first and once each, when the task fails for good."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import anyio
import pytest

from agentweave_bus.agent import BaseAgent, bind_context, capability, current_context, steps
from agentweave_bus.agent.steps import MOST_PASSES
from agentweave_bus.exceptions import (
    AgentWeaveError,
    RetryableError,
    TaskFailedError,
    UnreachableError,
)
from agentweave_bus.types import TaskResult
from tests.unit.agent.step_store import Crash, MemoryStore, Recorder, attempt, bound, perform, step, task

pytestmark = pytest.mark.anyio


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


# --- compensations ------------------------------------------------------------------------------------


def order(recorder: Recorder, end: Callable[[], Any]) -> Callable[[], Any]:
    async def handler() -> Any:
        await step("reserve", recorder.does("reserve", "r"), compensate=recorder.undoes("reserve"))
        await step("note", recorder.does("note", "n"))
        await step("charge", recorder.does("charge", "c"), compensate=recorder.undoes("charge"))
        return end()

    return handler


UNDONE = ["undo charge(c)", "undo reserve(r)"]
DONE = ["reserve", "note", "charge"]


def raising(error: BaseException) -> Callable[[], Any]:
    def end() -> None:
        raise error

    return end


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize(
    "end",
    [
        raising(TaskFailedError("no")),
        raising(ValueError("bug")),
        lambda: TaskResult(status="failed", error="no"),
        object,
    ],
)
async def test_a_task_that_fails_for_good_is_undone_in_reverse(
    recorder: Recorder, end: Callable[[], Any], durable: bool
) -> None:
    outcome = await attempt(order(recorder, end), MemoryStore() if durable else None)
    assert recorder.ran == DONE + UNDONE
    assert outcome.result.status == "failed"
    assert not outcome.retry
    assert "compensation" not in outcome.result.error


async def test_a_task_that_is_tried_again_is_not_undone_before_its_last_attempt(recorder: Recorder) -> None:
    handler = order(recorder, raising(RetryableError("later")))
    store = MemoryStore()
    for number in (1, 2):
        assert (await attempt(handler, store, number=number)).retry
    assert recorder.ran == DONE
    outcome = await attempt(handler, store, number=3, last=True)
    assert (outcome.result.error, outcome.retry) == ("later", False)
    assert recorder.ran == DONE + UNDONE


async def test_a_task_that_succeeds_is_not_undone(recorder: Recorder) -> None:
    assert (await attempt(order(recorder, lambda: "fine"), MemoryStore())).result.data == "fine"
    assert recorder.ran == DONE


async def test_the_compensation_gets_the_result_as_it_was(recorder: Recorder) -> None:
    async def handler() -> None:
        value = await step("reserve", lambda: {"n": 1}, compensate=recorder.undoes("reserve"))
        value["n"] = 2
        raise TaskFailedError("no")

    await attempt(handler, MemoryStore())
    assert recorder.ran == ["undo reserve({'n': 1})"]


async def test_a_step_that_failed_is_not_undone(recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    async def handler() -> None:
        await step("reserve", recorder.does("reserve", "r"), compensate=recorder.undoes("reserve"))
        failing = recorder.does("charge", error=TaskFailedError("declined"))
        await step("charge", failing, compensate=recorder.undoes("charge"))

    assert (await attempt(handler, MemoryStore())).result.error == "declined"
    assert recorder.ran == ["reserve", "charge", "undo reserve(r)"]
    assert caplog.records == []


async def test_a_step_whose_outcome_nobody_knows_is_told_in_the_log(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler() -> None:
        await step("charge", anyio.sleep, 60, compensate=recorder.undoes("charge"))

    await attempt(handler, MemoryStore(), last=True, timeout=0.05)
    assert recorder.ran == []
    assert "step charge began and has no result" in caplog.text


async def test_compensations_have_no_steps(recorder: Recorder) -> None:
    said = []

    async def undo(_: Any) -> None:
        try:
            await step("more", int)
        except AgentWeaveError as error:
            said.append(str(error))

    async def handler() -> None:
        await step("reserve", int, compensate=undo)
        raise TaskFailedError("no")

    await attempt(handler, MemoryStore())
    assert "can't stand inside step 'undo:reserve'" in said[0]


async def test_a_failing_compensation_is_tried_again_and_then_named(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    async def undo(_: Any) -> None:
        recorder.ran.append("undo charge")
        raise ConnectionError("secret")

    async def handler() -> None:
        await step("reserve", recorder.does("reserve"), compensate=recorder.undoes("reserve"))
        await step("charge", recorder.does("charge"), compensate=undo)
        raise TaskFailedError("no")

    outcome = await perform(handler, MemoryStore())
    assert recorder.ran == ["reserve", "charge", *["undo charge"] * MOST_PASSES, "undo reserve(None)"]
    said, number = outcome.result.error.rsplit(" ", 1)
    assert said == "no; the compensation of step 'charge' failed, correlation id"
    assert number in {record.correlation_id for record in caplog.records if record.exc_info}
    assert "secret" not in outcome.result.error


async def test_a_compensation_that_works_at_last_says_nothing(recorder: Recorder) -> None:
    left = [RetryableError("busy", retry_after=9), RetryableError("busy")]

    async def undo(_: Any) -> None:
        recorder.ran.append("undo")
        if left:
            raise left.pop(0)

    async def handler() -> None:
        await step("reserve", recorder.does("reserve"), compensate=undo)
        raise TaskFailedError("no")

    store = MemoryStore()
    first = await attempt(handler, store, last=True)
    assert (first.retry, first.retry_after) == (True, 9)
    assert (await perform(handler, store, attempts=0)).result.error == "no"
    assert recorder.ran == ["reserve", "undo", "undo", "undo"]


@pytest.mark.parametrize("error", [RetryableError("later"), TaskFailedError("no")])
async def test_whether_it_only_lacked_attempts_is_still_known_when_it_is_undone(error: Exception) -> None:
    busy = [RetryableError("busy")]

    async def undo(_: Any) -> None:
        if busy:
            raise busy.pop()

    async def handler() -> None:
        await step("reserve", int, compensate=undo)
        raise error

    outcome = await perform(handler, MemoryStore(), attempts=1)
    assert (outcome.result.error, outcome.retry) == (str(error), False)
    assert outcome.exhausted is isinstance(error, RetryableError)


async def test_a_compensation_that_hangs_is_a_failing_one(recorder: Recorder) -> None:
    async def undo(_: Any) -> None:
        await anyio.sleep(60)

    async def handler() -> None:
        await step("reserve", int, compensate=undo)
        raise TaskFailedError("no")

    with anyio.fail_after(30):
        outcome = await attempt(handler, MemoryStore(), timeout=0.05)
    assert outcome.retry
    assert "the compensation of step 'reserve' failed" in outcome.result.error


async def test_a_failure_on_the_way_to_recorded_steps_is_undone_by_a_replay(recorder: Recorder) -> None:
    """The last attempt does not get as far as an earlier one did."""
    store = MemoryStore()
    assert (await attempt(order(recorder, raising(RetryableError())), store)).retry
    away = [UnreachableError("away")]

    async def handler() -> Any:
        if away:
            raise away.pop()
        return await order(recorder, lambda: "fine")()

    last = await attempt(handler, store, number=2, last=True)
    assert last.retry, "what is recorded and was not reached is still to be undone"
    assert recorder.ran == DONE
    outcome = await attempt(handler, store, number=3, last=True)
    assert recorder.ran == DONE + UNDONE
    assert outcome.result.error.startswith("internal error"), "the verdict of the last attempt stands"


async def test_a_replay_ends_with_the_last_step_that_is_to_be_undone(recorder: Recorder) -> None:
    went_on = []
    left = [RetryableError()]

    async def undo(_: Any) -> None:
        if left:
            raise left.pop()

    async def handler() -> None:
        await step("reserve", int, compensate=undo)
        went_on.append(current_context().attempt)
        raise TaskFailedError("no")

    store = MemoryStore()
    assert (await attempt(handler, store)).retry
    assert not (await attempt(handler, store, number=2)).retry
    assert went_on == [1]


async def test_a_replay_finds_steps_that_run_beside_one_without_record(recorder: Recorder) -> None:
    async def later() -> None:
        await anyio.sleep(0.02)
        await step("late", recorder.does("late"), compensate=recorder.undoes("late"))

    async def handler() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(later)
            group.start_soon(partial(step, "stuck", anyio.sleep, 60, compensate=recorder.undoes("stuck")))

    store = MemoryStore()
    assert (await attempt(handler, store, timeout=0.2)).retry
    made = bound(handler)
    with bind_context(task(2)):
        outcome = await made.give_up(
            made.validate({}), TaskResult(status="failed", error="canceled"), store=store
        )
    assert outcome.result.error == "canceled"
    assert recorder.ran == ["late", "undo late(None)"]


async def test_recorded_steps_that_are_never_reached_again_are_named(recorder: Recorder) -> None:
    store = MemoryStore()
    await attempt(order(recorder, raising(RetryableError())), store)

    async def changed() -> None:
        raise TaskFailedError("another handler")

    outcome = await perform(changed, store, first=2)
    assert outcome.result.error.startswith("another handler; the compensation of step 'charge' failed")
    assert "'reserve' failed" in outcome.result.error
    assert recorder.ran == DONE


async def test_a_replay_stops_at_what_is_not_recorded(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_OTHERS_SECONDS", 0.05)
    store = MemoryStore()
    await attempt(order(recorder, raising(RetryableError())), store)

    async def changed() -> None:
        await step("new", recorder.does("new"))
        await order(recorder, int)()

    made = bound(changed)
    with bind_context(task(2)):
        outcome = await made.give_up(
            made.validate({}), TaskResult(status="failed", error="canceled"), store=store
        )
    assert outcome.retry
    assert recorder.ran == DONE


async def test_giving_up_undoes_without_going_on(recorder: Recorder) -> None:
    store = MemoryStore()
    handler = order(recorder, raising(AssertionError("went on")))
    store.crashes = [-5]  # charge ran, and could not be recorded
    with pytest.raises(Crash):
        await attempt(handler, store)
    made = bound(handler)
    with bind_context(task(2)):
        outcome = await made.give_up(
            made.validate({}), TaskResult(status="failed", error="canceled"), store=store
        )
    assert (outcome.result.error, outcome.retry) == ("canceled", False)
    assert recorder.ran == [*DONE, "undo reserve(r)"]


async def test_giving_up_runs_nothing_where_nothing_was_recorded(recorder: Recorder) -> None:
    store = MemoryStore()

    async def handler() -> None:
        recorder.ran.append("handler")

    made = bound(handler)
    with bind_context(task(4)):
        outcome = await made.give_up(
            made.validate({}), TaskResult(status="failed", error="lost"), store=store
        )
    assert (outcome.result.error, recorder.ran, store.written) == ("lost", [], [])


@pytest.mark.parametrize("behind_ms", [0, 5])
async def test_what_is_undone_after_the_deadline_is_undone_in_the_agents_own_name(
    recorder: Recorder, behind_ms: int
) -> None:
    """Also where the event loop's clock is somewhat ahead of the one by which the context counts."""
    seen = []
    began = time.monotonic_ns()

    def monotonic_ns() -> int:
        now = time.monotonic_ns()
        return now if now < began + 50_000_000 else now - behind_ms * 1_000_000

    async def undo(_: Any) -> None:
        seen.append((current_context().links, current_context().remaining()))

    async def handler() -> None:
        await step("reserve", recorder.does("reserve"), compensate=undo)
        await anyio.sleep(60)

    ends = int(datetime.now(UTC).timestamp() * 1000) + 100
    with anyio.fail_after(30):
        context = task(deadline_ms=ends, links=("l",), monotonic_ns=monotonic_ns)
        outcome = await attempt(handler, MemoryStore(), context=context)
    assert outcome.result.error.startswith("deadline exceeded")
    assert not outcome.retry
    assert seen == [((), float("inf"))]


@pytest.mark.parametrize(("seconds", "links"), [(60, ("l",)), (0.9, ())])
async def test_what_is_undone_in_time_is_undone_on_behalf_of_who_asked(
    seconds: float, links: tuple[str, ...]
) -> None:
    seen = []

    async def undo(_: Any) -> None:
        seen.append(current_context().links)

    async def handler() -> None:
        await step("reserve", int, compensate=undo)
        raise TaskFailedError("no")

    ends = int((datetime.now(UTC).timestamp() + seconds) * 1000)
    await attempt(handler, MemoryStore(), context=task(deadline_ms=ends, links=("l",)))
    assert seen == [links]


async def test_an_expired_task_is_undone_without_an_attempt(recorder: Recorder) -> None:
    store = MemoryStore()

    async def handler() -> Any:
        await anyio.sleep(0.01)
        return await order(recorder, raising(RetryableError()))()

    await attempt(handler, store)
    outcome = await attempt(handler, store, context=task(2, deadline_ms=1))
    assert outcome.result.error.startswith("deadline exceeded")
    assert not outcome.retry
    assert recorder.ran == DONE + UNDONE


# --- calls ---------------------------------------------------------------------------------------------


class Shop(BaseAgent):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    @capability("order")
    async def order(self, end: str) -> Any:
        name = "reserve"
        await self.context.step(name, self.recorder.does(name, "r"), compensate=self.recorder.undoes(name))
        if end == "hang":
            await anyio.sleep(60)
        if end == "fail":
            raise RetryableError("busy")
        return end


@pytest.mark.parametrize(("end", "undone"), [("fine", []), ("fail", ["undo reserve(r)"])])
async def test_a_call_that_fails_is_undone(recorder: Recorder, end: str, undone: list[str]) -> None:
    async with Shop(recorder) as shop:
        result = await shop.invoke("order", {"end": end}, context=task())
    assert recorder.ran == ["reserve", *undone]
    assert result.error == ("busy" if undone else None)


async def test_a_call_that_is_out_of_time_is_undone(recorder: Recorder) -> None:
    ends = int(datetime.now(UTC).timestamp() * 1000) + 100
    async with Shop(recorder) as shop:
        with anyio.fail_after(30):
            result = await shop.invoke("order", {"end": "hang"}, context=task(deadline_ms=ends))
    assert recorder.ran == ["reserve", "undo reserve(r)"]
    assert result.error.startswith("deadline exceeded")


async def test_a_call_that_is_cancelled_is_undone(recorder: Recorder) -> None:
    async with Shop(recorder) as shop, anyio.create_task_group() as group:
        group.start_soon(partial(shop.invoke, "order", {"end": "hang"}, context=task()))
        with anyio.fail_after(30):
            while not recorder.ran:
                await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()
    assert recorder.ran == ["reserve", "undo reserve(r)"]


async def test_a_call_says_what_could_not_be_undone(recorder: Recorder) -> None:
    async def undo(_: Any) -> None:
        raise OSError("secret")

    class Careless(BaseAgent):
        @capability("order")
        async def order(self) -> None:
            await self.context.step("first", int, compensate=recorder.undoes("first"))
            await self.context.step("second", int, compensate=undo)
            raise TaskFailedError("no")

    result = await Careless().invoke("order", context=task())
    assert result.error.startswith("no; the compensation of step 'second' failed, correlation id ")
    assert recorder.ran == ["undo first(0)"]
