"""Attempts at a task: which failures are tried again, when an attempt's time is over, who hears of progress."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import from_thread

from agentweave_bus.agent import (
    BaseAgent,
    RequestContext,
    StepRecord,
    bind_context,
    capability,
    current_context,
    work,
)
from agentweave_bus.exceptions import (
    AgentCallError,
    AgentWeaveError,
    AttemptLostError,
    AuthorizationError,
    BusError,
    CallRefusedError,
    CallTimeoutError,
    CircuitOpenError,
    ConnectionLostError,
    FederationError,
    NoResponderError,
    PayloadError,
    RetryableError,
    StepFailedError,
    TaskFailedError,
    UnreachableError,
)
from agentweave_bus.types import TaskResult
from tests.unit.agent.step_store import CALLER, MemoryStore, attempt, bound, task

pytestmark = pytest.mark.anyio


def raising(error: BaseException) -> Callable[[], Any]:
    async def handler() -> None:
        raise error

    return handler


def deadline_in(seconds: float) -> RequestContext:
    return task(deadline_ms=int((time.time() + seconds) * 1000))


async def hanging() -> None:
    await anyio.sleep(60)


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 30


# --- what is tried again -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "after"),
    [
        (RetryableError("busy"), None),
        (RetryableError("busy", retry_after=7.5), 7.5),
        (CallTimeoutError("x"), None),
        (ConnectionLostError("x"), None),
        (UnreachableError("x"), None),
        (NoResponderError("x"), None),
        (CircuitOpenError("x", retry_after=3.0), 3.0),
        (CallRefusedError("x", retry_after=2.0), 2.0),
        (
            ExceptionGroup(
                "x", [RetryableError("a", retry_after=1), ExceptionGroup("y", [UnreachableError("b")])]
            ),
            1,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_what_may_pass_is_tried_again(error: Exception, after: float | None) -> None:
    outcome = await attempt(raising(error))
    assert (outcome.retry, outcome.retry_after) == (True, after)
    assert outcome.result.status == "failed"
    last = await attempt(raising(error), last=True)
    assert (last.retry, last.retry_after) == (False, None)


@pytest.mark.parametrize(
    "error",
    [
        TaskFailedError("no"),
        PayloadError("no"),
        AuthorizationError("no"),
        FederationError("no", trust_domain="b.io"),
        CallRefusedError("no"),
        AgentCallError("no"),
        BusError("no"),
        StepFailedError("no", step="s", correlation_id="1"),
        TimeoutError("the handler's own"),
        ValueError("bug"),
        ExceptionGroup("x", [RetryableError("a"), ValueError("bug")]),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_all_else_is_not(error: Exception) -> None:
    outcome = await attempt(raising(error))
    assert (outcome.retry, outcome.retry_after) == (False, None)
    assert outcome.result.status == "failed"


@pytest.mark.parametrize(
    "result", ["fine", TaskResult(status="degraded"), TaskResult(status="failed", error="no")]
)
async def test_a_result_is_an_outcome(result: Any) -> None:
    async def handler() -> Any:
        return result

    outcome = await attempt(handler)
    assert (outcome.retry, outcome.correlation_id) == (False, None)
    assert outcome.result.status == getattr(result, "status", "completed")


async def test_a_result_without_json_form_is_the_authors_error() -> None:
    async def handler() -> Any:
        return object()

    outcome = await attempt(handler)
    assert outcome.result.error == f"internal error; correlation id {outcome.correlation_id}"
    assert not outcome.retry


async def test_only_what_was_meant_for_the_caller_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert (await attempt(raising(RetryableError("the till is closed")))).result.error == "the till is closed"
    assert (await attempt(raising(TaskFailedError("declined")))).result.error == "declined"
    assert caplog.records == []
    outcome = await attempt(raising(CallTimeoutError("secret")), number=4)
    (record,) = caplog.records
    assert outcome.result.error == f"internal error; correlation id {record.correlation_id}"
    assert outcome.correlation_id == record.correlation_id
    assert (record.task_id, record.caller, record.attempt) == ("t-1", CALLER, 4)
    assert "secret" in caplog.text


async def test_a_call_is_answered_with_the_message() -> None:
    class Till(BaseAgent):
        @capability("pay")
        async def pay(self) -> None:
            raise RetryableError("the till is closed", retry_after=3)

    result = await Till().invoke("pay")
    assert (result.status, result.error) == ("failed", "the till is closed")


@pytest.mark.parametrize("wrong", [-1, float("nan"), float("inf")])
def test_a_wait_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="retry_after"):
        RetryableError(retry_after=wrong)


# --- time --------------------------------------------------------------------------------------------


async def test_an_attempt_out_of_time_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    outcome = await attempt(hanging, timeout=0.05)
    assert outcome.retry
    assert outcome.result.error == f"deadline exceeded; correlation id {outcome.correlation_id}"
    assert caplog.records[0].correlation_id == outcome.correlation_id


async def test_a_task_out_of_time_is_not(caplog: pytest.LogCaptureFixture) -> None:
    outcome = await attempt(hanging, timeout=60, context=deadline_in(0.05))
    assert not outcome.retry
    assert outcome.result.error.startswith("deadline exceeded")


async def test_nothing_runs_after_the_deadline() -> None:
    ran = []

    async def handler() -> None:
        ran.append(1)

    outcome = await attempt(handler, context=deadline_in(-1))
    assert outcome.result.error.startswith("deadline exceeded")
    assert ran == []


@pytest.mark.parametrize("clean_up", [raising(ValueError("while cleaning up")), partial(anyio.sleep, 0)])
async def test_a_handler_that_fails_while_it_cleans_up_was_out_of_time(clean_up: Callable[[], Any]) -> None:
    async def handler() -> None:
        try:
            await hanging()
        finally:
            with anyio.CancelScope(shield=True):
                await clean_up()

    assert (await attempt(handler, timeout=0.05)).retry


async def test_the_wait_for_a_thread_ends_too() -> None:
    release = threading.Event()
    outcome = await attempt(lambda: release.wait(10), timeout=0.05)
    release.set()
    assert outcome.retry


async def test_who_cancels_from_outside_gets_through() -> None:
    began = anyio.Event()

    async def handler() -> None:
        began.set()
        await hanging()

    running = asyncio.create_task(attempt(handler, MemoryStore()))
    await began.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_awaiting_something_cancelled_is_a_failure() -> None:
    async def handler() -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    assert (await attempt(handler)).result.error.startswith("internal error")


# --- progress ----------------------------------------------------------------------------------------


class Sink:
    def __init__(self, error: Exception | None = None) -> None:
        self.told: list[Any] = []
        self.error = error

    async def progress(self, fraction: float, message: str) -> None:
        self.told.append((fraction, message))
        if self.error is not None:
            raise self.error

    async def artifact(self, artifact: Any) -> None:
        self.told.append(artifact)
        if self.error is not None:
            raise self.error


async def telling() -> str:
    context = current_context()
    await context.progress(0.5, "half")
    await context.artifact("rows", [(1, 2)], name="first")
    await context.artifact("rows", None)
    await context.progress(1)
    return "done"


async def test_who_watches_hears_of_progress() -> None:
    sink = Sink()
    assert (await attempt(telling, sink=sink)).result.data == "done"
    assert sink.told == [
        (0.5, "half"),
        {"type": "rows", "data": [[1, 2]], "name": "first"},
        {"type": "rows", "data": None},
        (1.0, ""),
    ]
    assert type(sink.told[-1][0]) is float


async def test_in_a_call_nobody_does() -> None:
    class Teller(BaseAgent):
        @capability("tell")
        async def tell(self) -> Any:
            return await telling()

    result = await Teller().invoke("tell", context=task())
    assert (result.data, result.artifacts) == ("done", [{"type": "data", "data": "done"}])


@pytest.mark.parametrize(
    "use",
    [
        lambda context: context.progress(1.01),
        lambda context: context.progress(-0.01),
        lambda context: context.progress(float("nan")),
        lambda context: context.progress(True),
        lambda context: context.progress("0.5"),
        lambda context: context.progress(0.5, 7),
        lambda context: context.progress(0.5, "x" * 1001),
        lambda context: context.artifact("t", object()),
        lambda context: context.artifact(7, 1),
        lambda context: context.artifact("t", 1, name=7),
    ],
)
async def test_what_is_no_progress_is_refused_in_calls_too(use: Callable[[RequestContext], Any]) -> None:
    with pytest.raises(PayloadError):
        await use(task())


@pytest.mark.parametrize("tell", ["progress", "artifact"])
async def test_progress_lets_the_timeout_begin_anew(tell: str) -> None:
    async def handler() -> str:
        for _ in range(10):
            await anyio.sleep(0.3)
            await (
                current_context().progress(0.1) if tell == "progress" else current_context().artifact("t", 1)
            )
        return "done"

    outcome = await attempt(handler, timeout=2.0)
    assert outcome.result.data == "done"


async def test_progress_does_not_move_the_tasks_deadline() -> None:
    async def handler() -> None:
        while True:
            await anyio.sleep(0.01)
            await current_context().progress(0.5)

    assert not (await attempt(handler, timeout=60, context=deadline_in(0.1))).retry


async def test_a_plain_handler_tells_from_its_thread() -> None:
    def handler() -> str:
        from_thread.run(current_context().progress, 0.5, "half")
        return "done"

    sink = Sink()
    assert (await attempt(handler, sink=sink)).result.data == "done"
    assert sink.told == [(0.5, "half")]


async def test_progress_that_can_not_be_told_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert (await attempt(telling, sink=Sink(BusError("away")))).result.data == "done"
    assert caplog.messages == ["progress could not be told: away"] * 4


async def test_an_artifact_that_is_too_large_is_the_handlers_affair() -> None:
    seen = []

    async def handler() -> None:
        try:
            await current_context().artifact("t", 1)
        except PayloadError as error:
            seen.append(str(error))

    await attempt(handler, sink=Sink(PayloadError("too large")))
    assert seen == ["too large"]


@pytest.mark.parametrize("store", [None, MemoryStore()])
async def test_who_learns_by_telling_that_the_task_is_lost_stops(store: MemoryStore | None) -> None:
    went_on = []

    async def handler() -> None:
        try:
            await current_context().progress(0.5)
        except Exception:
            went_on.append("caught")
        went_on.append("went on")

    with pytest.raises(AttemptLostError):
        await attempt(handler, store, sink=Sink(AttemptLostError("taken")))
    assert went_on == []


async def test_a_replay_tells_nothing_again() -> None:
    async def handler() -> None:
        await current_context().progress(0.1)
        await current_context().step("a", int, compensate=undo)
        await current_context().progress(0.5)
        await current_context().step("b", int, compensate=undo)
        raise TaskFailedError("no")

    left = [RetryableError("not yet")]

    async def undo(_: Any) -> None:
        if left:
            raise left.pop()

    store, first, second = MemoryStore(), Sink(), Sink()
    assert (await attempt(handler, store, sink=first)).retry
    assert not (await attempt(handler, store, sink=second, number=2)).retry
    assert first.told == [(0.1, ""), (0.5, "")]
    assert second.told == [(0.1, "")], "before the first step nobody knows that it is a replay"


# --- the context -------------------------------------------------------------------------------------


def test_the_attempt_is_the_first_unless_it_is_said() -> None:
    assert RequestContext(caller_spiffe_id=CALLER).attempt == 1
    assert task(3).attempt == 3


async def test_an_attempt_needs_its_task() -> None:
    made = bound(hanging)
    with pytest.raises(AgentWeaveError, match="no request is being handled here"):
        await made.attempt(made.validate({}), last_attempt=False)


async def test_without_a_store_nothing_is_recorded() -> None:
    async def handler() -> Any:
        return await current_context().step("one", lambda: 1)

    assert (await attempt(handler)).result.data == 1


async def test_threads_of_steps_are_counted_by_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """One caller's stuck steps don't take the threads of another's."""
    monkeypatch.setattr(work, "_threads", {asyncio.get_running_loop(): work.HandlerThreads(2)})
    release, began = threading.Event(), []

    def stick() -> None:
        began.append(1)
        release.wait(10)

    async def handler() -> Any:
        return await current_context().step("one", stick)

    stuck = [await attempt(handler, timeout=0.05) for _ in range(2)]
    assert all(outcome.retry for outcome in stuck)
    assert began == [1], "half of two threads is what one caller may have"
    other = RequestContext(caller_spiffe_id="spiffe://a.io/agent/other", kind="task")
    made = bound(lambda: from_thread.run(partial(current_context().step, "two", lambda: 2)))
    with bind_context(other):
        assert (await made.attempt(made.validate({}), last_attempt=True)).result.data == 2
    release.set()


def test_a_record_is_what_it_was() -> None:
    for record in (StepRecord({"a": [1, None]}), StepRecord(error={"type": "X", "message": "m"})):
        assert StepRecord.from_json(record.to_json()) == record
