"""Attack: approvals by whom nobody named, of what they were not given for, and after their time."""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.bus.streams import state_stream_name
from agentweave_bus.bus.subjects import api_inbox, control_subject
from agentweave_bus.envelope import Draft, Kind, decode_frame, decode_payload, new_id
from agentweave_bus.envelope.codec import pack
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.envelope.head import map_from_draft
from agentweave_bus.exceptions import AuthorizationError
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.approval import Decided
from agentweave_bus.tasks.record import RECORD_TYPE, RecordBody
from agentweave_bus.types import TaskState
from tests.integration.approval_stage import *  # noqa: F403
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, FRONT, MALLORY, MIDDLE, OTHER, PATIENCE
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import sealed_by

pytestmark = pytest.mark.anyio


async def refused(stage, handle, frame, why, *, verb="approve"):
    """It is refused in the audit log for that reason; the task waits on, and runs once it is approved of."""
    before = len(stage.world.refusals("echo", step_name="control"))
    await stage.say(frame, verb)
    record = await stage.world.refusal("echo", after=before, step_name="control")
    assert why in record["reason"], record
    await nothing_came_of_it(stage, handle)


async def nothing_came_of_it(stage, handle):
    assert (await handle.status()).state is TaskState.AUTH_REQUIRED
    assert stage.echo.ran == []
    await stage.other.client.task(handle.full_reference).approve(timeout=PATIENCE)
    assert (await handle.result(PATIENCE)).status == "completed"
    assert stage.echo.ran == ["work"]


def signed(stage, handle, who, *, iss=None, verb="approve", said=None, **changed):
    svid = stage.mallory.source.svid if who == MALLORY else stage.world.issue(who)
    payload = stage.says(handle, **(said or {}))
    return stage.sealed(svid, stage.head(handle, verb, **changed), payload, iss=iss or who)


@refused_by(Layer.WORKER, "an approval in an approver's name", by=Adversary.BROKER)
async def test_an_approval_in_an_approvers_name(approval_stage):
    handle = await approval_stage.waiting()
    frame = signed(approval_stage, handle, MALLORY, iss=OTHER)
    await refused(approval_stage, handle, frame, "in the name of")


@refused_by(Layer.WORKER, "an approval by who owns the broker", by=Adversary.BROKER)
async def test_an_approval_by_who_owns_the_broker(approval_stage):
    handle = await approval_stage.waiting()
    frame = signed(approval_stage, handle, MALLORY)
    await refused(approval_stage, handle, frame, "control:approve")


@refused_by(Layer.WORKER, "an approval by an agent that the policy did not name", by=Adversary.AGENT)
async def test_an_approval_by_another_agent(approval_stage):
    handle = await approval_stage.waiting()
    frame = signed(approval_stage, handle, FRONT)  # it may control:approve
    await refused(approval_stage, handle, frame, "none of those who may approve")


@refused_by(Layer.WORKER, "an approval by who was named and is no operator", by=Adversary.AGENT)
async def test_an_approval_without_the_grant(approval_stage):
    handle = await approval_stage.waiting()
    frame = signed(approval_stage, handle, MIDDLE)
    await refused(approval_stage, handle, frame, "no entry of operators lets")


@refused_by(Layer.WORKER, "an approval by the submitter, whom a prefix covers", by=Adversary.CALLER)
async def test_an_approval_by_the_submitter(approval_stage):
    handle = await approval_stage.waiting()
    frame = signed(approval_stage, handle, CLI, said={"sender": None})
    await refused(approval_stage, handle, frame, "takes part in the task")


@pytest.mark.parametrize("kept", ["the whole", "its record", "its head"])
@refused_by(Layer.WORKER, "a genuine approval, of another task", by=Adversary.BROKER)
async def test_an_approval_of_another_task(approval_stage, kept):
    """The id of this task, and digests of another one, in an envelope that the approver signed."""
    other, handle = await approval_stage.waiting(), await approval_stage.waiting()
    foreign = {"record": other._log.records[0].digest.hex()} if kept != "its head" else {}
    head = {"re": bytes.fromhex(other.digest)} if kept != "its record" else {}
    frame = signed(approval_stage, handle, OTHER, said=foreign, **head)
    await refused(approval_stage, handle, frame, "about another task")
    await other.cancel(timeout=PATIENCE)


@refused_by(Layer.WORKER, "an approval of another payload", by=Adversary.BROKER)
async def test_an_approval_of_another_payload(approval_stage):
    handle = await approval_stage.waiting()
    frame = signed(approval_stage, handle, OTHER, said={"pd": "0d" * 32})
    await refused(approval_stage, handle, frame, "about another task")


@pytest.mark.parametrize("offset", [-1, -20, 40], ids=["end", "payload", "head"])
@refused_by(Layer.WORKER, "a genuine approval with a byte altered", by=Adversary.BROKER)
async def test_an_altered_approval(approval_stage, offset):
    handle = await approval_stage.waiting()
    frame = bytearray(signed(approval_stage, handle, OTHER))
    frame[offset] ^= 0x01
    await refused(approval_stage, handle, bytes(frame), "")


@refused_by(Layer.WORKER, "a genuine rejection, sent as an approval", by=Adversary.BROKER)
async def test_a_rejection_as_an_approval(approval_stage):
    handle = await approval_stage.waiting()
    frame = signed(approval_stage, handle, OTHER, verb="reject")
    await refused(approval_stage, handle, frame, "no approval of a task of this agent")


@refused_by(Layer.WORKER, "a genuine approval, sent again for the next task", by=Adversary.BROKER)
async def test_an_approval_again(approval_stage):
    heard = await approval_stage.mallory.listen(control_subject(ECHO, "approve"))
    first = await approval_stage.waiting()
    await approval_stage.other.client.task(first.full_reference).approve(timeout=PATIENCE)
    await first.result(PATIENCE)
    captured = (await heard_within(heard)).data
    approval_stage.echo.ran.clear()
    handle = await approval_stage.waiting()
    await refused(approval_stage, handle, captured, "heard before")


@refused_by(Layer.WORKER, "a genuine approval that was kept back for too long", by=Adversary.BROKER)
async def test_an_old_approval(approval_stage):
    handle = await approval_stage.waiting()
    now_ms = clock_ms()
    frame = signed(approval_stage, handle, OTHER, iat=now_ms - 31_000, exp=now_ms + 30_000)
    await refused(approval_stage, handle, frame, "ms ago")


@refused_by(Layer.WORKER, "an approval after the time for it", by=Adversary.CALLER)
async def test_an_approval_after_its_time(approval_stage):
    handle = await approval_stage.waiting("say")
    with pytest.raises(AuthorizationError, match="not approved in time"):
        await handle.result(PATIENCE)
    frame = signed(approval_stage, handle, OTHER, said={"cap": "say"})
    await approval_stage.say(frame)
    before = await approval_stage.waiting()  # by then it was heard
    await nothing_came_of_it(approval_stage, before)
    assert (await handle.status()).state is TaskState.REJECTED


@pytest.mark.parametrize("writer", [MALLORY, OTHER, CLI], ids=["broker", "approver", "submitter"])
@refused_by(Layer.RECORD, "a record of an approval, written by whom it is not up to", by=Adversary.BROKER)
async def test_a_forged_record_of_an_approval(approval_stage, writer):
    stage = approval_stage
    handle = await stage.waiting()
    first, now_ms = handle._log.records[0], clock_ms()
    svid = stage.mallory.source.svid if writer == MALLORY else stage.world.issue(writer)
    draft = Draft(
        kind=Kind.RECORD,
        id=new_id(now_ms),
        aud=SpiffeID(f"spiffe://{ECHO.trust_domain}"),
        cap=RECORD_TYPE,
        sub=handle._ref.subject(1),
        iat=now_ms,
        exp=now_ms + 60_000,
        re=first.task,
        seq=1,
        prev=first.digest,
        att=0,
    )
    decided = Decided(by=str(OTHER), at=now_ms, control="0d" * 32)
    payload = RecordBody(state=TaskState.SUBMITTED, pd=first.body.pd, decided=decided).encoded()
    head = pack(map_from_draft(draft, iss=writer, x5t=svid.x5t, pd=sha256(payload), par=None))
    await stage.mallory.send(draft["sub"], sealed_by(svid, head, payload).frame)
    await asyncio.sleep(0.1)
    await nothing_came_of_it(stage, handle)


async def test_the_approvers_own_approval(approval_stage):
    """Honest: the same frame, sealed by who may, lets the task run."""
    handle = await approval_stage.waiting()
    await approval_stage.say(signed(approval_stage, handle, OTHER))
    assert (await handle.result(PATIENCE)).status == "completed"


async def test_an_approver_reads_what_needs_no_approval(approval_stage):
    """Not protected: an approver of one capability reads all that the agent recorded for that sender."""
    stage = approval_stage
    raw, inbox = await stage.world.raw(OTHER), api_inbox(OTHER, "A" * 22) + ".x"
    heard = await raw.listen(inbox)
    handle = await stage.cli.client.submit(str(ECHO), "whoami")  # nobody is named for it
    await handle.result(PATIENCE)
    read = f"$JS.API.DIRECT.GET.{state_stream_name(ECHO)}.{handle._ref.subject(1)}"
    await raw.send(read.replace(handle._ref.key, "*"), b"", inbox)  # the key needs not be known
    record = await asyncio.wait_for(heard.get(), PATIENCE)
    assert decode_payload(decode_frame(record.data).payload)["state"] == "completed"
    assert raw.refused == []
