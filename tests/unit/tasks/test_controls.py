"""Cancelling: who may, what it does where, and what is no cancellation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from agentweave_bus.authz import AuthzContext, AuthzDecision
from agentweave_bus.authz.audit_format import LogName
from agentweave_bus.bus.subjects import control_subject
from agentweave_bus.envelope import Draft, Kind, encode_payload, new_id
from agentweave_bus.exceptions import AuditError, AuthorizationError, CallRefusedError, CallTimeoutError
from agentweave_bus.tasks import handle as module_of_handles
from agentweave_bus.tasks.controls import CancelBody, Controls
from agentweave_bus.tasks.handle import TaskHandle
from agentweave_bus.types import TaskState
from tests.unit.tasks.conftest import PD, TASK, World, body
from tests.unit.tasks.shared_world import *  # noqa: F403

pytestmark = pytest.mark.anyio


class Operators:
    """A policy that lets some do an operator's act."""

    def __init__(self, *who: str) -> None:
        self.who = who
        self.asked: list[AuthzContext] = []

    async def authorize(self, context: AuthzContext) -> AuthzDecision:
        self.asked.append(context)
        return AuthzDecision(allowed=context.caller in self.who, reason="the operators' list")


class Stage:
    """A worker's ear, and what it was told to cancel. ``runs`` says whether a task runs here."""

    def __init__(self, world: World, *operators: str) -> None:
        self.world = world
        self.runs = False
        self.told: list[tuple[str, bytes, str]] = []
        self.policy = Operators(*operators)
        parts = world.parts["agent"]
        self.controls = Controls(
            desk=parts.desk,
            keeper=parts.keeper,
            me=parts.me,
            capabilities=["work"],
            authorizer=self.policy,  # type: ignore[arg-type]
            audit=parts.audit,
            on_cancel=self.cancel,
        )

    def cancel(self, key: str, digest: bytes, reason: str) -> bool:
        self.told.append((key, digest, reason))
        return self.runs

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        async with self.controls.running():
            await self.controls._on_session(await self.world.parts["agent"].keeper.session(1))
            yield

    async def frame(self, who: str = "client", **changed: Any) -> bytes:
        """An honest cancellation, but for what is changed: of its head, and ``says`` of its payload."""
        parts, ref = self.world.parts[who], self.world.ref
        now_ms = parts.desk.clock_ms()
        says = CancelBody(id=ref.id, cap="work", pd=PD, reason="enough").model_dump(exclude_none=True)
        payload = encode_payload(says | changed.pop("says", {}))
        values: dict[str, Any] = {
            "kind": Kind.CONTROL,
            "id": new_id(now_ms),
            "aud": ref.agent,
            "cap": "cancel",
            "sub": control_subject(ref.agent, "cancel"),
            "iat": now_ms,
            "exp": now_ms + 30_000,
            "re": TASK,
        }
        draft = Draft(**(values | changed))
        return (await parts.sealer.seal(draft, changed.get("payload", payload))).frame

    async def hear(self, frame: bytes) -> list[tuple[str, int]]:
        """Let the worker hear a frame; return what is recorded of the task then."""
        await self.controls.hear(control_subject(self.world.ref.agent, "cancel"), frame)
        log = self.world.log()
        await log.refresh()
        return [(str(one.state), one.epoch) for one in log.records]

    def audited(self, event: str) -> list[dict[str, Any]]:
        """What the worker wrote into its audit log about this task."""
        path = self.world.parts["agent"].config.authorization.audit.path
        lines = [line for file in LogName.of(path).files() for line in file.read_text().splitlines()]
        records = [json.loads(line) for line in lines]
        return [one for one in records if one["event"] == event]


async def until(check: Callable[[], bool]) -> None:
    """Wait for something that announces itself to nobody."""
    async with asyncio.timeout(30):
        while not check():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.01)


@pytest.fixture
def stage(world: World) -> Stage:
    return Stage(world)


@pytest.fixture
def handle(world: World) -> TaskHandle:
    return world.parts["client"].handles.of(world.ref, TASK, bytes.fromhex(PD))


async def test_a_task_that_never_began_is_cancelled_on_record(stage: Stage) -> None:
    assert await stage.hear(await stage.frame()) == [("canceled", 0)]
    log = stage.world.log("client")
    await log.refresh()
    assert log.last is not None
    assert (log.last.task, log.last.body.pd, log.last.body.message) == (TASK, PD, "enough")
    record = stage.audited("control")[-1]
    assert (record["task"], record["allowed"]) == (stage.world.task_id, True)


async def test_a_task_that_runs_here_is_cancelled_here(stage: Stage) -> None:
    stage.runs = True
    assert await stage.hear(await stage.frame()) == []
    assert stage.told == [(stage.world.ref.key, TASK, "enough")]


async def test_a_task_that_runs_elsewhere_is_left_to_its_worker(stage: Stage) -> None:
    await stage.world.log().append(body(TaskState.WORKING), TASK)
    assert await stage.hear(await stage.frame()) == [("working", 1)]


@pytest.mark.parametrize("state", [TaskState.SUBMITTED, TaskState.AUTH_REQUIRED, TaskState.INPUT_REQUIRED])
async def test_a_task_that_waits_is_cancelled_on_record(stage: Stage, state: TaskState) -> None:
    log = stage.world.log()
    await log.append(body(TaskState.WORKING), TASK)
    await log.append(body(state), TASK)
    assert (await stage.hear(await stage.frame()))[-1] == ("canceled", 1)


async def test_a_task_that_has_ended_stays_as_it_ended(stage: Stage) -> None:
    await stage.world.log().append(body(TaskState.FAILED, message="x"), TASK)
    assert await stage.hear(await stage.frame()) == [("failed", 0)]


async def test_of_another_head_nothing_is_cancelled(stage: Stage) -> None:
    log = stage.world.log()
    await log.append(body(TaskState.WORKING), TASK)
    await log.append(body(TaskState.SUBMITTED), TASK)
    assert (await stage.hear(await stage.frame(re=b"\x09" * 32)))[-1] == ("submitted", 1)


WRONG: dict[str, dict[str, Any]] = {
    "of another kind": {"kind": Kind.CALL, "re": None, "reply": "A" * 22},
    "for another agent": {"aud": "another"},
    "another verb": {"cap": "approve"},
    "for another subject": {"sub": "aw.control.a.b.cancel"},
    "about no head": {"re": None},
    "too old": {"iat": -31_000},
    "from the future": {"iat": 5_000},
    "of a capability that is not served": {"says": {"cap": "other"}},
    "of no id": {"says": {"id": "17"}},
    "with another member": {"says": {"force": True}},
    "of no digest": {"says": {"pd": ""}},
    "of a sender that is none": {"says": {"sender": "cli"}},
    "that can't be read": {"payload": b"\xc1"},
}


@pytest.mark.parametrize("name", WRONG)
async def test_what_is_no_cancellation_does_nothing(stage: Stage, name: str) -> None:
    changed = dict(WRONG[name])
    if "iat" in changed:
        now_ms = stage.world.desk("client").clock_ms()
        changed |= {"iat": now_ms + changed["iat"], "exp": now_ms + 60_000}
    if "aud" in changed:
        changed["aud"] = stage.world.parts["mallory"].me
    frame = await stage.frame(**{key: value for key, value in changed.items() if key != "payload"})
    if "payload" in changed:
        parts, ref = stage.world.parts["client"], stage.world.ref
        now_ms = parts.desk.clock_ms()
        draft = Draft(
            kind=Kind.CONTROL,
            id=new_id(now_ms),
            aud=ref.agent,
            cap="cancel",
            sub=control_subject(ref.agent, "cancel"),
            iat=now_ms,
            exp=now_ms + 1_000,
            re=TASK,
        )
        frame = (await parts.sealer.seal(draft, changed["payload"])).frame
    refused = len(stage.audited("refusal"))
    assert await stage.hear(frame) == []
    assert not stage.told
    assert [one["step_name"] for one in stage.audited("refusal")[refused:]] == ["control"]


async def test_an_altered_cancellation_does_nothing(stage: Stage) -> None:
    frame = bytearray(await stage.frame())
    frame[-8] ^= 1
    assert await stage.hear(bytes(frame)) == []
    assert not stage.told


async def test_nobody_cancels_by_a_captured_cancellation_again(stage: Stage) -> None:
    stage.runs = True
    frame = await stage.frame()
    await stage.hear(frame)
    await stage.hear(frame)
    assert len(stage.told) == 1
    assert "heard before" in stage.audited("refusal")[-1]["reason"]


async def test_another_agents_cancellation_is_about_its_own_task(stage: Stage) -> None:
    """The same id is another task then: keys follow from who asks."""
    stage.runs = True
    await stage.hear(await stage.frame("mallory"))
    assert [key for key, _, _ in stage.told] != [stage.world.ref.key]


async def test_another_agent_may_not_cancel_for_the_sender(stage: Stage) -> None:
    stage.runs = True
    sender = str(stage.world.parts["client"].me)
    assert await stage.hear(await stage.frame("mallory", says={"sender": sender})) == []
    assert not stage.told
    record = stage.audited("refusal")[-1]
    assert (record["reason"], record["action"]) == ("the operators' list", "control:cancel")


async def test_an_operator_may(world: World) -> None:
    stage = Stage(world, str(world.parts["mallory"].me))
    sender = str(world.parts["client"].me)
    assert await stage.hear(await stage.frame("mallory", says={"sender": sender})) == [("canceled", 0)]
    assert [(one.action, one.kind, one.task_id) for one in stage.policy.asked] == [
        ("control:cancel", "control", world.task_id)
    ]


async def test_who_does_not_say_of_which_payload_cancels_only_what_is_on_record(world: World) -> None:
    stage = Stage(world, str(world.parts["mallory"].me))
    says = {"sender": str(world.parts["client"].me), "pd": None}
    assert await stage.hear(await stage.frame("mallory", says=says)) == []
    log = world.log()
    await log.append(body(TaskState.WORKING), TASK)
    await log.append(body(TaskState.SUBMITTED), TASK)
    assert (await stage.hear(await stage.frame("mallory", says=says)))[-1] == ("canceled", 1)


async def test_nothing_is_done_that_can_not_be_recorded(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(_record: object) -> None:
        raise AuditError("the disk is full")

    monkeypatch.setattr(stage.world.parts["agent"].audit, "record", fails)
    stage.runs = True
    assert await stage.hear(await stage.frame()) == []
    assert not stage.told


async def test_what_is_said_again_is_recorded_once(stage: Stage) -> None:
    stage.runs = True
    before = len(stage.audited("control"))
    for _ in range(3):
        await stage.hear(await stage.frame())
    assert len(stage.told) == 3
    assert len(stage.audited("control")) == before + 1


# --- from the handle --------------------------------------------------------------------------------------


async def test_a_handle_cancels_what_never_began(stage: Stage, handle: TaskHandle) -> None:
    async with stage.listening():
        status = await handle.cancel("not needed", timeout=10)
    assert (status.state, status.message) == ("canceled", "not needed")


async def test_a_handle_says_it_again_until_it_was_heard(stage: Stage, handle: TaskHandle) -> None:
    log = stage.world.log()
    await log.append(body(TaskState.WORKING), TASK)  # elsewhere, so that nobody here heeds it
    async with stage.listening():
        cancelling = asyncio.create_task(handle.cancel("late", timeout=30))
        await until(lambda: len(stage.told) == 1)
        stage.told.clear()
        await stage.world.bus.clock.advance(1.1)
        await until(lambda: len(stage.told) == 1)
        await log.append(body(TaskState.CANCELED, message="late"), TASK)
        assert (await cancelling).state == "canceled"


async def test_a_task_that_ends_by_itself_meanwhile_says_how(stage: Stage, handle: TaskHandle) -> None:
    log = stage.world.log()
    await log.append(body(TaskState.WORKING), TASK)
    cancelling = asyncio.create_task(handle.cancel(timeout=10))
    await asyncio.sleep(0.05)
    await log.append(body(TaskState.COMPLETED, result={"status": "completed", "messages": []}), TASK)
    assert (await cancelling).state == "completed"


async def test_a_handle_of_a_reference_cancels_what_has_begun(stage: Stage, handle: TaskHandle) -> None:
    named = stage.world.parts["client"].handles.named(handle.reference)
    stage.runs = True
    async with stage.listening():
        cancelling = asyncio.create_task(named.cancel("by name", timeout=10))
        await asyncio.sleep(0.1)
        assert not stage.told  # nobody knows the task's digest yet
        log = stage.world.log()
        await log.append(body(TaskState.WORKING), TASK)
        await until(lambda: bool(stage.told))
        await log.append(body(TaskState.CANCELED, message="by name"), TASK)
        assert (await cancelling).state == "canceled"
    assert stage.told[0] == (stage.world.ref.key, TASK, "by name")


async def test_a_cancellation_has_a_deadline(world: World, handle: TaskHandle) -> None:
    await world.log().append(body(TaskState.WORKING), TASK)
    with pytest.raises(CallTimeoutError, match="has not ended within"):
        await handle.cancel(timeout=0.2)


async def test_who_does_not_know_the_task_is_told_why_nothing_came_of_it(world: World) -> None:
    named = world.parts["client"].handles.of(world.ref)
    with pytest.raises(CallTimeoutError, match="its submission is not in this identity's audit log"):
        await named.cancel(timeout=0.3)


async def test_a_reason_has_a_bound(world: World, handle: TaskHandle) -> None:
    await world.log().append(body(TaskState.WORKING), TASK)
    with pytest.raises(CallRefusedError, match="1000"):
        await handle.cancel("x" * 1_001, timeout=5)


async def test_the_broker_says_no_to_who_may_submit_nothing_there(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of_handles, "_LOOK_S", 0.1)  # the broker does not say that it may not look
    stranger = await world.bus.client("client/stranger")
    async with asyncio.timeout(30):
        parts = stranger._connected()
        handle = parts.handles.of(
            type(world.ref)(world.ref.agent, parts.me, "work", world.task_id), TASK, b"\x01" * 32
        )
        with pytest.raises(AuthorizationError) as denied:
            await handle.cancel(timeout=8)
        assert denied.value.direction == "broker"
