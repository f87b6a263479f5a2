"""Handles: what is told of a task is what its agent recorded, told soon, and told as what it is."""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta
from typing import cast

import pytest

from agentweave_bus.bus.connection import Keeper, Session, SessionListener
from agentweave_bus.bus.subjects import record_subject
from agentweave_bus.exceptions import (
    AuthorizationError,
    CallRefusedError,
    CallTimeoutError,
    ConfigurationError,
    IdempotencyError,
    NoResponderError,
    TaskCanceledError,
)
from agentweave_bus.tasks import hints
from agentweave_bus.tasks.handle import Handles, TaskHandle, TaskReference
from agentweave_bus.tasks.hints import Hints
from agentweave_bus.types import TaskState
from tests.unit.tasks.conftest import PD, TASK, World, body
from tests.unit.tasks.shared_world import *  # noqa: F403

pytestmark = pytest.mark.anyio

RESULT = {"status": "completed", "messages": [], "artifacts": [{"type": "data", "data": {"n": 1}}]}


@pytest.fixture
def handle(world: World) -> TaskHandle:
    return world.parts["client"].handles.of(world.ref, TASK, bytes.fromhex(PD))


async def test_status_follows_the_log(world: World, handle: TaskHandle) -> None:
    assert (await handle.status()).to_json() == {"state": "submitted", "attempt": 0}
    log = world.log()
    await log.append(body(TaskState.WORKING), TASK)
    assert (await handle.status()).attempt == 1
    await log.append(body(TaskState.SUBMITTED, message="busy", retry_at=7), TASK)
    status = await handle.status()
    assert (status.state, status.message, status.retry_at) == ("submitted", "busy", 7)
    await log.append(body(TaskState.WORKING), TASK)
    ended = await log.append(body(TaskState.COMPLETED, result=RESULT), TASK)
    status = await handle.status()
    assert ended is not None
    assert (status.state, status.attempt, status.since_ms) == ("completed", 2, ended.at_ms)
    assert status.result is not None
    assert status.to_json()["result"]["artifacts"] == RESULT["artifacts"]


@pytest.mark.parametrize("there", [True, False])
async def test_a_stranger_is_told_that_a_task_is_not_his_to_read_and_no_more(
    world: World, handle: TaskHandle, there: bool
) -> None:
    if there:
        await world.log().append(body(TaskState.COMPLETED, result=RESULT), TASK)
    stranger = world.parts["mallory"].handles.named(handle.full_reference)
    with pytest.raises(AuthorizationError, match="not this identity's to read, if there is one") as told:
        await stranger.status()
    assert told.value.direction == "broker"
    assert "ends with '@' and who submitted it" in str(told.value)
    assert not re.search(r"states-|aw\.state|JS\.API", str(told.value))


async def test_an_agent_that_never_ran_has_no_tasks(world: World) -> None:
    await world.bus.grant("client/cli", "agent/nobody", "work")
    reference = f"{world.bus.id('agent/nobody')}#work/{world.task_id}"
    with pytest.raises(NoResponderError, match="agent/nobody has no tasks here: has a worker"):
        await world.parts["client"].handles.named(reference).status()


async def test_a_result_comes_with_its_record_and_not_with_the_next_poll(
    world: World, handle: TaskHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hints, "_POLL_S", 60.0)
    log = world.log()
    await log.append(body(TaskState.WORKING), TASK)
    waiting = asyncio.create_task(handle.result(30))
    await asyncio.sleep(0.1)
    await log.append(body(TaskState.COMPLETED, result=RESULT), TASK)
    assert (await waiting).data == {"n": 1}


async def test_without_hints_the_poll_finds_it(
    world: World, handle: TaskHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def deaf(*_: object) -> None:
        return

    monkeypatch.setattr(Hints, "_hear", deaf)
    waiting = asyncio.create_task(handle.result(30))
    await asyncio.sleep(0.1)
    await world.log().append(body(TaskState.FAILED, message="no"), TASK)
    await world.bus.clock.advance(2.1)
    result = await waiting
    assert (result.status, result.error) == ("failed", "no")


async def test_what_a_hint_says_is_believed_in_nothing(world: World, handle: TaskHandle) -> None:
    """Also a genuine record of an end that stands in no slot, such as a losing worker's."""
    log, ref = world.log(), world.ref
    sealed = await log._sealed(body(TaskState.CANCELED), TASK)
    waiting = asyncio.create_task(handle.result(0.6))
    await asyncio.sleep(0.1)
    session = await world.parts["agent"].keeper.session(1)
    await session.publish(record_subject(ref.agent, ref.sender, ref.key, 50), sealed.frame)
    with pytest.raises(CallTimeoutError, match="goes on"):
        await waiting
    assert (await handle.status()).state is TaskState.SUBMITTED


async def test_nobody_listens_before_somebody_waits_and_nothing_is_kept_after(world: World) -> None:
    parts = world.parts["client"]
    handles = Handles(desk=parts.desk, keeper=parts.keeper, me=parts.me, audit=parts.audit)
    handle, heard = handles.of(world.ref), handles._means.hints
    assert not heard._hearing
    with pytest.raises(CallTimeoutError):
        await handle.result(0.05)
    assert len(heard._hearing) == 1
    assert not heard._waiting
    assert heard._count == 0


async def test_who_was_woken_too_early_looks_again_soon(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker passes a message on before it can be read."""
    monkeypatch.setattr(hints, "_POLL_S", 60.0)
    parts = world.parts["client"]
    async with Hints(me=parts.me, keeper=parts.keeper).waiting(world.ref.key) as waiting:
        waiting.hint()
        async with asyncio.timeout(30):
            for _ in range(4):
                await waiting.next_look()
        waiting.hint()
        await waiting.next_look()
        waiting.found()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.4):
                await waiting.next_look()


async def test_who_begins_to_wait_while_a_connection_is_made_is_woken_on_that_one(world: World) -> None:
    class Rotating:
        """Has a connection, and makes another one."""

        def __init__(self) -> None:
            self.current = Heard()

        def on_session(self, listener: SessionListener) -> None:
            self.listener = listener

        async def session(self, _timeout_s: float) -> Heard:
            return self.current

    class Heard:
        def __init__(self) -> None:
            self.subjects: list[str] = []

        async def serve(self, subject: str, *_: object) -> None:
            self.subjects.append(subject)

    keeper, new = Rotating(), Heard()
    heard = Hints(me=world.parts["client"].me, keeper=cast("Keeper", keeper))
    await keeper.listener(cast("Session", new))
    async with heard.waiting(world.ref.key) as waiting:
        assert not new.subjects
        keeper.current = new
        for _ in range(2):
            waiting.hint()
            await waiting.next_look()
    assert len(new.subjects) == len(set(new.subjects)) == 2


async def test_many_who_wait_ask_less_often(world: World) -> None:
    parts = world.parts["client"]
    hints = Hints(me=parts.me, keeper=parts.keeper)
    assert 1.8 <= hints.poll_s() <= 2.0
    hints._count = 10_000
    assert 18 <= hints.poll_s() <= 20


async def test_a_cancelled_task_has_no_result(world: World, handle: TaskHandle) -> None:
    await world.log().append(body(TaskState.CANCELED, message="not needed"), TASK)
    with pytest.raises(TaskCanceledError) as canceled:
        await handle.result(30)
    assert (canceled.value.reason, canceled.value.task_id) == ("not needed", handle.id)


async def test_a_rejected_task_says_by_whom(world: World, handle: TaskHandle) -> None:
    told = "no grant (audit id cf0d4a95-1)"
    await world.log().append(body(TaskState.REJECTED, message=told, step="authorization"), TASK)
    with pytest.raises(AuthorizationError, match="no grant") as denied:
        await handle.result(30)
    assert (denied.value.audit_id, denied.value.direction) == ("cf0d4a95-1", "inbound")


async def test_a_task_that_was_refused_for_another_reason_says_at_which_step(
    world: World, handle: TaskHandle
) -> None:
    await world.log().append(body(TaskState.REJECTED, message="n: missing", step="payload"), TASK)
    with pytest.raises(CallRefusedError, match="n: missing") as refused:
        await handle.result(30)
    assert refused.value.step == "payload"


async def test_another_payload_under_the_same_id_is_an_error_everywhere(world: World) -> None:
    await world.log().append(body(TaskState.WORKING), TASK)
    handle = world.parts["client"].handles.of(world.ref, b"\x08" * 32, b"\xcd" * 32)
    for ask in (handle.status, handle.result, handle.cancel):
        with pytest.raises(IdempotencyError) as mixed_up:
            await ask()
        assert mixed_up.value.task_id == handle.id
    with pytest.raises(IdempotencyError):
        await anext(handle.events())


async def test_another_head_with_the_same_payload_is_the_same_task(world: World) -> None:
    log = world.log()
    await log.append(body(TaskState.WORKING), TASK)
    await log.append(body(TaskState.COMPLETED, result=RESULT), TASK)
    handle = world.parts["client"].handles.of(world.ref, b"\x08" * 32, bytes.fromhex(PD))
    assert (await handle.result(30)).data == {"n": 1}


async def test_a_task_that_nobody_took_up_expires_for_its_submitter_too(world: World) -> None:
    now_ms = world.desk("client").clock_ms()
    handle = world.parts["client"].handles.of(world.ref, TASK, bytes.fromhex(PD), now_ms + 60_000)
    waiting = asyncio.create_task(handle.result())
    await world.bus.clock.advance(timedelta(seconds=65))
    assert not waiting.done()  # its worker may still say so itself
    await world.bus.clock.advance(timedelta(seconds=10))
    with pytest.raises(CallTimeoutError, match=f"{handle.id} has expired"):
        await waiting


async def test_a_task_that_began_in_time_does_not_expire(world: World) -> None:
    now_ms = world.desk("client").clock_ms()
    handle = world.parts["client"].handles.of(world.ref, TASK, bytes.fromhex(PD), now_ms + 60_000)
    log = world.log()
    await log.append(body(TaskState.WORKING), TASK)
    waiting = asyncio.create_task(handle.result())
    await world.bus.clock.advance(timedelta(minutes=5))
    await log.append(body(TaskState.COMPLETED, result=RESULT), TASK)
    assert (await waiting).status == "completed"


async def test_several_may_ask_one_handle_at_once(world: World, handle: TaskHandle) -> None:
    waiting = [asyncio.create_task(handle.result(30)) for _ in range(8)]
    log = world.log()
    for state in (TaskState.WORKING, TaskState.SUBMITTED, TaskState.WORKING):
        await log.append(body(state), TASK)
    await log.append(body(TaskState.COMPLETED, result=RESULT), TASK)
    assert {one.data["n"] for one in await asyncio.gather(*waiting)} == {1}
    assert [one.digest for one in handle._log.records] == [one.digest for one in log.records]


async def test_a_reference_names_the_task_in_another_process(world: World, handle: TaskHandle) -> None:
    await world.log().append(body(TaskState.CANCELED, message="over"), TASK)
    assert handle.reference == f"{handle.target}#work/{handle.id}"
    assert str(TaskReference.parse(handle.reference)) == handle.reference
    again = world.parts["client"].handles.named(handle.reference)
    assert (again.id, again.target, again.capability) == (handle.id, handle.target, "work")
    assert (handle.digest, again.digest) == (TASK.hex(), None)
    assert (await again.status()).message == "over"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "spiffe://a.test/agent/x",
        "spiffe://a.test/agent/x#work",
        "spiffe://a.test/agent/x#work/17",
        "spiffe://a.test#work/01890a5d-ac96-774b-bcce-b302099a8057",
        "agent/x#work/01890a5d-ac96-774b-bcce-b302099a8057",
        "spiffe://a.test/agent/x#Work/01890a5d-ac96-774b-bcce-b302099a8057",
        "spiffe://a.test/agent/x#work/01890A5D-ac96-774b-bcce-b302099a8057",
        "spiffe://a.test/agent/x#work/01890a5d-ac96-774b-bcce-b302099a8057/",
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(ConfigurationError, match="names no task"):
        TaskReference.parse(text)
