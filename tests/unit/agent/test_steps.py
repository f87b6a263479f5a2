"""Durable steps: recorded once, returned alike ever after."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import from_thread

from agentweave_bus.agent import current_context
from agentweave_bus.agent.records import StepRecord
from agentweave_bus.exceptions import (
    AgentWeaveError,
    AttemptLostError,
    AuthorizationError,
    BusError,
    CircuitOpenError,
    PayloadError,
    RetryableError,
    StepFailedError,
    TaskFailedError,
    UnreachableError,
)
from tests.unit.agent.step_store import MemoryStore, Recorder, attempt, bound, perform, step

pytestmark = pytest.mark.anyio


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


# --- running and replaying ---------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [True, False])
async def test_the_result_is_the_json_form_at_once(durable: bool) -> None:
    noon = datetime(2026, 1, 2, 12, tzinfo=UTC)
    seen = []

    async def handler() -> Any:
        seen.append(
            await step("quote", lambda amount, at: {"amount": amount, "at": at}, Decimal("1.10"), at=noon)
        )
        return seen[-1]

    store = MemoryStore() if durable else None
    outcome = await attempt(handler, store)
    if durable:
        await attempt(handler, store, number=2)
        assert store.operations == 1 + 2, (
            "the first attempt only writes; the second asks for the verdict, too"
        )
    assert outcome.result.data == {"amount": "1.10", "at": "2026-01-02T12:00:00+00:00"}
    assert all(one == outcome.result.data for one in seen)
    assert len(seen) == 1 + durable


async def test_a_recorded_step_does_not_run_again(recorder: Recorder) -> None:
    async def handler() -> Any:
        first = await step("first", recorder.does("first", [1]))
        second = await step("second", recorder.does("second", 2))
        return [first, second]

    store = MemoryStore(-2)  # the second step ran and could not be recorded
    assert (await perform(handler, store)).result.data == [[1], 2]
    assert recorder.ran == ["first", "second", "second"]


async def test_plain_functions_run_in_a_thread_with_their_context() -> None:
    def where() -> list[Any]:
        return [threading.get_ident(), current_context().task_id]

    async def handler() -> Any:
        return await step("where", where)

    ident, task_id = (await attempt(handler, MemoryStore())).result.data
    assert ident != threading.get_ident()
    assert task_id == "t-1"


async def test_handlers_in_all_threads_may_wait_for_steps_in_threads() -> None:
    meeting = threading.Barrier(16)

    def handler() -> Any:
        meeting.wait(10)  # every thread that a caller may have waits here
        return from_thread.run(partial(step, "inner", lambda: 7))

    made = bound(handler)
    outcomes = []

    async def one() -> None:
        outcomes.append((await attempt(made, MemoryStore())).result.data)

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            for _ in range(16):
                group.start_soon(one)
    assert outcomes == [7] * 16


async def test_steps_may_run_side_by_side(recorder: Recorder) -> None:
    async def handler() -> Any:
        async with anyio.create_task_group() as group:
            for name in ("a", "b", "c"):
                group.start_soon(partial(step, name, recorder.does(name), compensate=recorder.undoes(name)))
        raise TaskFailedError("no")

    store = MemoryStore()
    assert (await perform(handler, store)).result.error == "no"
    assert sorted(recorder.ran[:3]) == ["a", "b", "c"]
    assert recorder.ran[3:] == [f"undo {name}(None)" for name in reversed(recorder.ran[:3])]
    assert [json.loads(store.texts[f"saga:{n}"])["value"] for n in (1, 2, 3)] == recorder.ran[:3]


# --- misuse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda: step("Charge it", int), "can't name a step"),
        (lambda: step("undo:x", int), "can't name a step"),
        (lambda: step(7, int), "can't name a step"),
        (lambda: step("charge", 7), "takes a function and its arguments"),
        (lambda: step("charge", int, compensate=7), "takes a function and its arguments"),
        (lambda: step("twice", int), "there are two steps 'twice'"),
        (lambda: step("outer", lambda: step("inner", int)), "can't stand inside step 'outer'"),
    ],
)
async def test_misuse_is_explained(use: Callable[[], Any], says: str, durable: bool) -> None:
    said = []

    async def handler() -> None:
        await step("twice", int)
        try:
            await use()
        except AgentWeaveError as error:
            said.append(str(error))

    await attempt(handler, MemoryStore() if durable else None)
    assert says in said[0]


async def test_a_step_after_the_handler_is_refused() -> None:
    later: list[asyncio.Task[Any]] = []
    over = anyio.Event()

    async def behind() -> None:
        await over.wait()
        await step("late", int)

    async def handler() -> None:
        later.append(asyncio.create_task(behind()))

    await attempt(handler, MemoryStore())
    over.set()
    with pytest.raises(AgentWeaveError, match="comes too late"):
        await later[0]


async def test_a_result_without_json_form_is_a_recorded_failure(recorder: Recorder) -> None:
    seen = []

    async def handler() -> None:
        try:
            await step("odd", recorder.does("odd", object()))
        except PayloadError as error:
            seen.append(str(error))
        raise RetryableError

    store = MemoryStore()
    await perform(handler, store)
    assert len(set(seen)) == 1
    assert len(seen) == 3
    assert recorder.ran == ["odd"]


# --- failures ------------------------------------------------------------------------------------------


class DeclinedError(TaskFailedError):
    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.card, self.hidden = "visa", object()


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize(
    ("error", "kind", "attributes"),
    [
        (TaskFailedError("declined"), TaskFailedError, {}),
        (DeclinedError("declined"), TaskFailedError, {"card": "visa"}),
        (
            AuthorizationError("no", reason="no grant", audit_id="a-1", direction="outbound"),
            AuthorizationError,
            {"reason": "no grant", "audit_id": "a-1", "direction": "outbound"},
        ),
        (CircuitOpenError("later", retry_after=7.5), CircuitOpenError, {"retry_after": 7.5}),
        (KeyError("secret"), StepFailedError, {"step": "charge"}),
    ],
)
async def test_a_failure_is_seen_alike_in_every_attempt(
    recorder: Recorder, error: Exception, kind: type, attributes: dict[str, Any], durable: bool
) -> None:
    seen: list[AgentWeaveError] = []

    async def handler() -> None:
        try:
            await step("charge", recorder.does("charge", error=error))
        except AgentWeaveError as caught:
            seen.append(caught)
        await step("note", recorder.does("note"))
        raise RetryableError

    store = MemoryStore() if durable else None
    await attempt(handler, store)
    if durable:
        await attempt(handler, store, number=2)
        assert recorder.ran == ["charge", "note"]
        assert str(seen[0]) == str(seen[1])
    assert "secret" not in str(seen[0])
    for one in seen:
        assert type(one) is kind
        assert {name: getattr(one, name) for name in attributes} == attributes


async def test_a_passing_failure_that_ends_the_attempt_is_not_recorded(recorder: Recorder) -> None:
    errors: list[Exception | None] = [UnreachableError("nobody there"), RetryableError("busy"), None]

    async def charge() -> str:
        recorder.ran.append("charge")
        if (error := errors.pop(0)) is not None:
            raise error
        return "paid"

    async def handler() -> Any:
        return await step("charge", charge)

    assert (await perform(handler, MemoryStore())).result.data == "paid"
    assert recorder.ran == ["charge"] * 3


async def test_failures_side_by_side_are_all_recorded_when_the_handler_goes_on(recorder: Recorder) -> None:
    async def busy(name: str) -> None:
        recorder.ran.append(name)
        await anyio.sleep(0.01)  # both run by then
        raise RetryableError("busy")

    async def tries(name: str) -> None:
        with suppress(RetryableError):
            await step(name, busy, name)

    async def handler() -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(tries, "a")
            group.start_soon(tries, "b")
        await step("c", recorder.does("c"))
        raise RetryableError

    await perform(handler, MemoryStore())
    assert recorder.ran == ["a", "b", "c"]


async def test_an_unknown_failure_is_logged_once_with_its_traceback(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler() -> None:
        await step("charge", recorder.does("charge", error=KeyError("secret")))

    store = MemoryStore()
    outcome = await attempt(handler, store)
    again = await attempt(handler, store, number=2)
    number = outcome.correlation_id
    assert outcome.result.error == again.result.error == f"internal error; correlation id {number}"
    assert {record.correlation_id for record in caplog.records} == {number}
    assert caplog.text.count("Traceback") == 1
    assert recorder.ran == ["charge"]


@pytest.mark.parametrize(
    "fault", [BusError("the broker is away"), AttemptLostError("taken"), OSError("disk")]
)
async def test_what_the_store_raises_ends_the_attempt_whatever_the_handler_catches(fault: Exception) -> None:
    went_on = []

    class Broken(MemoryStore):
        async def save(self, name: str, record: StepRecord) -> StepRecord:
            raise fault

    async def handler() -> None:
        try:
            await step("charge", int)
        except Exception:
            went_on.append("caught")
        went_on.append("went on")

    with pytest.raises(type(fault)) as caught:
        await attempt(handler, Broken())
    assert caught.value is fault
    assert went_on == []


async def test_who_loses_the_write_of_a_step_drops_everything(recorder: Recorder) -> None:
    store = MemoryStore()

    async def slow() -> str:
        await store.save("charge", StepRecord("by the other"))
        return "by this one"

    async def handler() -> None:
        await step("charge", slow, compensate=recorder.undoes("charge"))

    with pytest.raises(AttemptLostError):
        await attempt(handler, store)
    assert recorder.ran == []


async def test_a_record_that_is_too_large_is_the_handlers_failure() -> None:
    class Small(MemoryStore):
        async def save(self, name: str, record: StepRecord) -> StepRecord:
            raise PayloadError("too large")

    async def handler() -> None:
        await step("big", lambda: "x" * 9999)

    outcome = await attempt(handler, Small())
    assert outcome.result.error.startswith("internal error")
    assert not outcome.retry


async def test_a_result_is_written_even_when_the_attempt_is_being_cancelled() -> None:
    store, saving, written = MemoryStore(), anyio.Event(), anyio.Event()

    class Slow(MemoryStore):
        async def save(self, name: str, record: StepRecord) -> StepRecord:
            saving.set()
            await written.wait()
            return await store.save(name, record)

    async def handler() -> None:
        await step("charge", lambda: "paid")

    with anyio.fail_after(30):
        async with anyio.create_task_group() as group:
            group.start_soon(attempt, handler, Slow())
            await saving.wait()
            group.cancel_scope.cancel()
            written.set()
    assert store.values() == {"charge"}


# --- the record ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, [], {}, {"value": 1, "error": {}}, {"error": "x"}, {"v": 1}])
def test_what_is_no_record_is_refused(wrong: Any) -> None:
    with pytest.raises(PayloadError):
        StepRecord.from_json(wrong)
