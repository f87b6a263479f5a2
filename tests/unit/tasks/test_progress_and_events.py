"""Progress and events: all of them in order, each once, wherever a reader goes on; what is missing is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from agentweave_bus.bus.streams import progress_stream_name
from agentweave_bus.bus.subjects import progress_subject
from agentweave_bus.envelope import Draft, Kind, encode_payload, new_id
from agentweave_bus.exceptions import AttemptLostError, BusError, ConfigurationError, PayloadError
from agentweave_bus.runtime.task_service import Telling
from agentweave_bus.tasks import hints
from agentweave_bus.tasks.events import TaskEvent
from agentweave_bus.tasks.handle import TaskHandle
from agentweave_bus.tasks.progress import ProgressBody, ProgressChain, ProgressWriter
from agentweave_bus.types import TaskState
from tests.unit.tasks.conftest import PD, TASK, World, body
from tests.unit.tasks.shared_world import *  # noqa: F403
from tests.unit.tasks.shared_world import foreign

pytestmark = pytest.mark.anyio

PIECE = {"type": "page", "data": {"text": "…"}, "name": "one"}


@pytest.fixture
def handle(world: World) -> TaskHandle:
    return world.parts["client"].handles.of(world.ref, TASK, bytes.fromhex(PD))


def writer(world: World, attempt: int = 1) -> ProgressWriter:
    return ProgressWriter(world.desk("agent"), world.ref, TASK, attempt)


@asynccontextmanager
async def writing(world: World, attempt: int = 1) -> AsyncIterator[ProgressWriter]:
    progress = writer(world, attempt)
    try:
        yield progress
    finally:
        await progress.finish()


async def seen(handle: TaskHandle, after: str | None = None) -> list[TaskEvent]:
    async with asyncio.timeout(30):
        return [event async for event in handle.events(after=after)]


def brief(events: list[TaskEvent]) -> list[str]:
    return [
        f"{one.state}" if one.kind == "state" else f"{one.kind} {one.fraction or one.missing or ''}".strip()
        for one in events
    ]


async def two_attempts(world: World) -> None:
    """A task that is tried twice, with progress and an artifact in both."""
    log = world.log()
    for attempt in (1, 2):
        await log.append(body(TaskState.WORKING), TASK)
        async with writing(world, attempt) as progress:
            await progress.progress(0.25 * attempt, "so far")
            await progress.finish()
            await progress.artifact(PIECE | {"data": attempt})
        if attempt == 1:
            await log.append(body(TaskState.SUBMITTED, message="again"), TASK)
    done = body(TaskState.COMPLETED, result={"status": "completed", "messages": []})
    await log.append(done._replace(progress=progress.mark()), TASK)


ALL = [
    *("working", "progress 0.25", "artifact", "submitted"),
    *("working", "progress 0.5", "artifact", "completed"),
]


async def test_every_event_in_order(world: World, handle: TaskHandle) -> None:
    await two_attempts(world)
    events = await seen(handle)
    assert brief(events) == ALL
    assert [one.attempt for one in events] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert events[2].artifact == PIECE | {"data": 1}
    assert events[1].message == "so far"
    assert events[-1].result is not None
    assert len({one.cursor for one in events}) == len(events)


async def test_from_every_cursor_on_there_is_exactly_the_rest(world: World, handle: TaskHandle) -> None:
    await two_attempts(world)
    events = await seen(handle)
    for number, event in enumerate(events, 1):
        other = world.parts["client"].handles.named(handle.reference)
        assert await seen(other, event.cursor) == events[number:]


async def test_events_come_as_they_happen(
    world: World, handle: TaskHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints, "_POLL_S", 60.0)
    log, events = world.log(), handle.events()
    async with asyncio.timeout(30):
        await log.append(body(TaskState.WORKING), TASK)
        assert (await anext(events)).state == "working"
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.1)
        async with writing(world) as progress:
            await progress.progress(0.5)
            assert (await waiting).fraction == 0.5
            await progress.progress(0.75)
        await log.append(body(TaskState.FAILED, message="no"), TASK)
        assert brief([event async for event in events]) == ["progress 0.75", "failed"]


@pytest.mark.parametrize(
    "cursor", ["", "1", "1.2.3", "1.2.3.zz", "-1.0.0.-", "1.2.3.-.", "1" * 20 + ".0.0.-"]
)
async def test_what_is_no_cursor(handle: TaskHandle, cursor: str) -> None:
    with pytest.raises(ConfigurationError, match="no cursor"):
        await anext(handle.events(after=cursor))


async def test_much_progress_is_told_ten_times_a_second_and_the_last_always(world: World) -> None:
    began = time.monotonic()
    async with writing(world) as progress:
        for number in range(250):
            await progress.progress(number / 250)
            await asyncio.sleep(0.001)
    most = (time.monotonic() - began) * 10 + 2
    told = await chain_of(world)
    assert told[-1].body.fraction == 249 / 250
    assert 3 <= len(told) <= most
    mark = progress.mark()
    assert mark is not None
    assert (mark.count, mark.digest) == (len(told), told[-1].digest.hex())


async def chain_of(world: World) -> list[Any]:
    chain, told = ProgressChain(world.desk("client"), world.ref, TASK), []
    while (entry := await chain.next()) is not None:
        told.append(entry)
    return told


async def test_every_artifact_is_told(world: World) -> None:
    async with writing(world) as progress:
        for number in range(20):
            await progress.artifact({"type": "n", "data": number})
    assert [one.body.artifact.data for one in await chain_of(world)] == list(range(20))


async def test_artifacts_and_progress_keep_their_order(world: World) -> None:
    async with writing(world) as progress:
        for number in range(3):
            await progress.progress(number / 4)
            await progress.artifact({"type": "n", "data": number})
        await progress.progress(1.0)
    told = [one.body for one in await chain_of(world)]
    assert [one.fraction if one.artifact is None else one.artifact.data for one in told] == [
        *(0.0, 0, 0.25, 1, 0.5, 2, 1.0)
    ]


async def test_who_tells_nothing_has_no_mark(world: World) -> None:
    async with writing(world) as progress:
        pass
    assert progress.mark() is None


@pytest.mark.parametrize("told", [False, True])
async def test_what_a_handler_leaves_running_tells_no_progress(world: World, told: bool) -> None:
    log = world.log()
    asks, kept = SimpleNamespace(digest=TASK), SimpleNamespace(extend=lambda: None)
    record = await log.append(body(TaskState.WORKING), TASK)
    run: Any = SimpleNamespace(log=log, record=record, opened=SimpleNamespace(asks=asks), kept=kept)
    telling = Telling(world.desk("agent"), run)
    if told:
        await telling.progress(0.5, "")
    await telling.finish()
    assert (telling.mark() is not None) is told
    await telling.artifact(PIECE)
    await telling.progress(0.75, "")
    await asyncio.sleep(0.3)
    assert [one.body.fraction for one in await chain_of(world)] == ([0.5, None] if told else [None])


async def test_an_attempt_that_was_lost_tells_no_more(world: World) -> None:
    first, second = writer(world, 1), writer(world, 2)
    await first.artifact(PIECE)
    await second.artifact(PIECE | {"data": 2})
    with pytest.raises(AttemptLostError):
        await first.artifact(PIECE)
    with pytest.raises(AttemptLostError):
        await first.progress(0.5)
    await second.artifact(PIECE | {"data": 3})
    assert [one.body.attempt for one in await chain_of(world)] == [1, 2, 2]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), float("inf")])
async def test_what_is_no_fraction(world: World, fraction: float) -> None:
    with pytest.raises(PayloadError, match="fraction"):
        await writer(world).progress(fraction)


async def test_an_artifact_that_is_too_large_is_the_handlers_error(world: World) -> None:
    progress = writer(world)
    with pytest.raises(PayloadError):
        await progress.artifact({"type": "huge", "data": "x" * 800_000})
    await progress.artifact(PIECE)
    assert len(await chain_of(world)) == 1


# --- what an earlier attempt told -------------------------------------------------------------------------


async def tell(progress: ProgressWriter, *told: tuple[float, str] | int) -> None:
    """Tell fractions with their words, each on its own, and artifacts."""
    for one in told:
        if isinstance(one, int):
            await progress.artifact({"type": "n", "data": one})
        else:
            await progress.progress(*one)
            await progress._tell_latest()
    await progress.finish()


async def told_by(world: World, attempt: int) -> list[object]:
    bodies = [one.body for one in await chain_of(world) if one.body.attempt == attempt]
    return [(one.fraction, one.message) if one.artifact is None else one.artifact.data for one in bodies]


FIRST = ((0.1, "a"), 1, (0.2, "b"), 2)
PHASES = ((0.5, "load"), (1.0, "load"), (0.2, "store"), (0.4, "store"))
WORDS = ((0.0, "load"), (0.0, "parse"))


@pytest.mark.parametrize(
    ("before", "now", "news"),
    [
        (FIRST, (*FIRST, (0.3, "c"), 3), [(0.3, "c"), 3]),
        (FIRST, ((0.1, "a"), 1, (0.15, "late"), (0.2, "other"), 4), [(0.2, "other"), 4]),
        (FIRST, ((0.1, "x"), (0.9, "y"), (0.1, "z")), [(0.9, "y"), (0.1, "z")]),
        (FIRST, (1, 1, 2, 2), [1, 2]),
        (FIRST, FIRST, []),
        (PHASES, (*PHASES, (0.6, "store"), (1.0, "store")), [(0.6, "store"), (1.0, "store")]),
        (WORDS, (*WORDS, (0.0, "write"), (0.0, "load")), [(0.0, "write"), (0.0, "load")]),
        ((), FIRST, list(FIRST)),
    ],
)
async def test_a_later_attempt_tells_what_is_new(world: World, before: Any, now: Any, news: Any) -> None:
    await tell(writer(world), *before)
    await tell(writer(world, 2), *now)
    assert await told_by(world, 1) == list(before)
    assert await told_by(world, 2) == news


async def test_a_third_attempt_goes_by_all_before_it(world: World) -> None:
    await tell(writer(world), *FIRST)
    await tell(writer(world, 2), (0.1, "a"), 1, (0.4, "c"), 7)
    await tell(writer(world, 3), *FIRST, (0.4, "c"), 7, (0.5, "d"), 8)
    assert await told_by(world, 3) == [(0.5, "d"), 8]


async def test_a_redrive_begins_anew(world: World) -> None:
    await tell(writer(world), *FIRST)
    redriven = ProgressWriter(world.desk("agent"), world.ref, TASK, 2, since=2)
    await tell(redriven, *FIRST)
    again = ProgressWriter(world.desk("agent"), world.ref, TASK, 3, since=2)
    await tell(again, *FIRST, (0.3, "c"))
    assert await told_by(world, 2) == list(FIRST)
    assert await told_by(world, 3) == [(0.3, "c")]


async def test_who_tells_nothing_new_has_the_mark_of_what_stands(world: World) -> None:
    await tell(writer(world), *FIRST)
    second = writer(world, 2)
    await tell(second, *FIRST)
    mark, told = second.mark(), await chain_of(world)
    assert mark is not None
    assert (mark.count, mark.digest) == (len(FIRST), told[-1].digest.hex())


async def test_what_can_not_be_read_again_is_told_again(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await tell(writer(world), *FIRST)
    second = writer(world, 2)

    async def fails() -> None:
        raise BusError("no answer")

    monkeypatch.setattr(second._chain, "next", fails)
    await tell(second, *FIRST)
    assert await told_by(world, 2) == list(FIRST)
    assert "is told again: no answer" in caplog.text


async def test_an_attempt_that_was_lost_hears_of_it_by_what_stands(world: World) -> None:
    await tell(writer(world, 3), 1)
    with pytest.raises(AttemptLostError):
        await writer(world, 2).progress(0.5)


# --- what is missing, and what is forged ------------------------------------------------------------------


def smuggle(world: World, slot: int, frame: bytes) -> None:
    """Store a frame where only somebody with full rights at the broker can."""
    ref = world.ref
    stream = world.bus.broker.jetstream.streams[progress_stream_name(ref.agent)]
    stream.store(progress_subject(ref.agent, ref.sender, ref.key, slot), frame, None)


async def forged(world: World, who: str, slot: int, **changed: Any) -> bytes:
    """Seal what would be progress in ``slot``, as somebody, with some of it changed."""
    parts, ref = world.parts[who], world.ref
    now_ms = parts.desk.clock_ms()
    says = changed.pop("says", ProgressBody(attempt=1, fraction=1.0).encoded())
    values: dict[str, Any] = {
        "kind": Kind.PROGRESS,
        "id": new_id(now_ms),
        "aud": ref.sender,
        "cap": ref.capability,
        "sub": progress_subject(ref.agent, ref.sender, ref.key, slot),
        "iat": now_ms,
        "exp": now_ms + 60_000,
        "re": TASK,
        "seq": 0,
    }
    return (await parts.sealer.seal(Draft(**(values | changed)), says)).frame


FORGERIES: dict[str, tuple[str, dict[str, Any]]] = {
    "by another agent": ("mallory", {}),
    "by the submitter": ("client", {}),
    "of another task": ("agent", {"re": b"\x09" * 32}),
    "of another capability": ("agent", {"cap": "other"}),
    "of another place": ("agent", {"sub": "aw.progress.a.b.c.d.e.0"}),
    "that follows on what is not there": ("agent", {"seq": 1, "prev": b"\x01" * 32}),
    "that is a record": (
        "agent",
        {"kind": Kind.RECORD, "cap": "task.state", "att": 1, "aud": "of the domain"},
    ),
    "that says two things": (
        "agent",
        {
            "says": encode_payload(
                {"v": 1, "attempt": 1, "fraction": 0.5, "artifact": {"type": "a", "data": 1}}
            )
        },
    ),
    "that says nothing": ("agent", {"says": encode_payload({"v": 1, "attempt": 1})}),
    "whose payload can't be read": ("agent", {"says": b"\xc1"}),
    "by another agent whose clock goes ahead": ("mallory", {"iat": 2**50, "exp": 2**50 + 60_000}),
}


@pytest.mark.parametrize("name", FORGERIES)
async def test_forged_progress_is_told_by_nobody(world: World, handle: TaskHandle, name: str) -> None:
    who, changed = FORGERIES[name]
    if changed.get("aud"):
        changed = changed | {"aud": type(world.ref.agent)(f"spiffe://{world.ref.agent.trust_domain}")}
    log, before = world.log(), foreign(world)
    await log.append(body(TaskState.WORKING), TASK)
    async with writing(world) as progress:
        await progress.progress(0.5)
        await progress.finish()
    number = 1 if "follows" in name else 0
    if number:
        changed = changed | {"seq": 1}
    else:
        last = progress.mark()
        assert last is not None
        changed = {"seq": 1, "prev": bytes.fromhex(last.digest)} | changed
    smuggle(world, 1, await forged(world, who, 1, **changed))
    async with writing(world, 2) as again:
        await again.artifact(PIECE)
    done = body(TaskState.FAILED, message="x")._replace(progress=again.mark())
    await log.append(body(TaskState.WORKING), TASK)
    await log.append(done, TASK)
    assert brief(await seen(handle)) == ["working", "progress 0.5", "working", "artifact", "failed"]
    assert foreign(world) == before + 1


async def test_a_copy_of_genuine_progress_is_told_nowhere_else(world: World, handle: TaskHandle) -> None:
    other = World(world.bus, world.parts, new_id(world.desk("agent").clock_ms()))
    async with writing(other) as progress:
        await progress.progress(0.5)
    ref = other.ref
    stream = world.bus.broker.jetstream.streams[progress_stream_name(ref.agent)]
    copied = stream.last_of(progress_subject(ref.agent, ref.sender, ref.key, 0))
    assert copied is not None
    smuggle(world, 0, copied.data)
    log = world.log()
    await log.append(body(TaskState.WORKING), TASK)
    await log.append(body(TaskState.FAILED, message="x"), TASK)
    assert brief(await seen(handle)) == ["working", "failed"]


async def test_progress_that_was_withheld_is_told_as_a_gap(world: World, handle: TaskHandle) -> None:
    log = world.log()
    await log.append(body(TaskState.WORKING), TASK)
    async with writing(world) as progress:
        for _ in range(4):
            await progress.artifact(PIECE)
    stream = world.bus.broker.jetstream.streams[progress_stream_name(world.ref.agent)]
    subject = progress_subject(world.ref.agent, world.ref.sender, world.ref.key, 1)
    dropped = stream.last_of(subject)
    assert dropped is not None
    stream._drop(dropped.sequence)
    smuggle(world, 1, b"something else")
    done = body(TaskState.FAILED, message="x")._replace(progress=progress.mark())
    await log.append(done, TASK)
    events = await seen(handle)
    assert brief(events) == ["working", "artifact", "gap 1", "artifact", "artifact", "failed"]
    for number, event in enumerate(events, 1):
        assert await seen(handle, event.cursor) == events[number:]


async def test_progress_whose_end_was_withheld_is_told_as_a_gap(world: World, handle: TaskHandle) -> None:
    log = world.log()
    await log.append(body(TaskState.WORKING), TASK)
    async with writing(world) as progress:
        for _ in range(3):
            await progress.artifact(PIECE)
    stream = world.bus.broker.jetstream.streams[progress_stream_name(world.ref.agent)]
    for slot in (1, 2):
        last = stream.last_of(progress_subject(world.ref.agent, world.ref.sender, world.ref.key, slot))
        assert last is not None
        stream._drop(last.sequence)
    done = body(TaskState.FAILED, message="x")._replace(progress=progress.mark())
    await log.append(done, TASK)
    events = await seen(handle)
    assert brief(events) == ["working", "artifact", "gap 2", "failed"]
    assert await seen(handle, events[2].cursor) == events[3:]
