"""Attack: cancellations by whom the task is not, sent where every replica of its agent hears them."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.subjects import control_subject
from agentweave_bus.types import TaskState
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, FRONT, MALLORY, MIDDLE, PATIENCE
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.task_stage import *  # noqa: F403

pytestmark = pytest.mark.anyio

SUBJECT = control_subject(ECHO, "cancel")


async def refused(stage, handle, frame, why, *, subject=SUBJECT):
    """It is refused in the audit log for that reason, and the task ends as if nothing had been said."""
    before = len(stage.world.refusals("echo", step_name="control"))
    await stage.mallory.send(subject, frame)
    record = await stage.world.refusal("echo", after=before, step_name="control")
    assert why in record["reason"], record
    await stage.nothing_came_of_it(handle)


@refused_by(Layer.WORKER, "a cancellation of somebody else's task, in one's own name", by=Adversary.BROKER)
async def test_a_cancellation_by_another(stage):
    handle = await stage.running()
    payload = stage.cancels(handle, sender=str(CLI))
    frame = stage.sealed(stage.mallory.source.svid, stage.cancel(handle), payload, iss=MALLORY)
    await refused(stage, handle, frame, "control:cancel")


@refused_by(Layer.WORKER, "a cancellation in the submitter's name", by=Adversary.BROKER)
async def test_a_cancellation_in_the_submitters_name(stage):
    handle = await stage.running()
    frame = stage.sealed(stage.mallory.source.svid, stage.cancel(handle), stage.cancels(handle), iss=CLI)
    await refused(stage, handle, frame, "in the name of")


@refused_by(Layer.WORKER, "a cancellation by another who may submit tasks there", by=Adversary.AGENT)
async def test_a_cancellation_by_another_agent(stage):
    handle = await stage.running()
    payload = stage.cancels(handle, sender=str(CLI))
    frame = stage.sealed(stage.world.issue(FRONT), stage.cancel(handle), payload, iss=FRONT)
    await refused(stage, handle, frame, "control:cancel")


@refused_by(Layer.WORKER, "a cancellation of the same id and head, as one's own task's", by=Adversary.AGENT)
async def test_a_cancellation_of_the_same_id(stage):
    """Keys follow from who asks, so it is about another task: one that never was."""
    handle = await stage.running()
    frame = stage.sealed(stage.world.issue(FRONT), stage.cancel(handle), stage.cancels(handle), iss=FRONT)
    await stage.mallory.send(SUBJECT, frame)
    await stage.nothing_came_of_it(handle)


@pytest.mark.parametrize("offset", [-1, -20, 40], ids=["end", "payload", "head"])
@refused_by(Layer.WORKER, "a genuine cancellation with a byte altered", by=Adversary.BROKER)
async def test_an_altered_cancellation(stage, offset):
    captured = await genuine(stage)
    handle = await stage.running()
    frame = bytearray(captured)
    frame[offset] ^= 0x01
    await refused(stage, handle, bytes(frame), "")


@refused_by(Layer.WORKER, "a genuine cancellation, sent again", by=Adversary.BROKER)
async def test_a_cancellation_again(stage):
    captured = await genuine(stage)
    handle = await stage.running()
    await refused(stage, handle, captured, "heard before")


async def genuine(stage):
    """A cancellation that the submitter sent, of another task, as it went over the wire."""
    heard = await stage.mallory.listen(SUBJECT)
    other = await stage.running()
    assert (await other.cancel(timeout=PATIENCE)).state is TaskState.CANCELED
    stage.probe.entered.clear()
    stage.probe.cleaned_up.clear()
    return (await heard_within(heard)).data


@refused_by(Layer.WORKER, "a cancellation for another agent, sent on to this one", by=Adversary.BROKER)
async def test_a_cancellation_for_another_agent(stage):
    handle = await stage.running()
    head = stage.cancel(handle, aud=MIDDLE, sub=control_subject(MIDDLE, "cancel"))
    frame = stage.sealed(stage.world.issue(CLI), head, stage.cancels(handle), iss=CLI)
    await refused(stage, handle, frame, "no cancellation of a task of this agent")


@refused_by(Layer.WORKER, "a genuine cancellation that was kept back for too long", by=Adversary.BROKER)
async def test_an_old_cancellation(stage):
    handle = await stage.running()
    head = stage.cancel(handle)
    head |= {"iat": head["iat"] - 31_000, "exp": head["exp"] + 60_000}
    frame = stage.sealed(stage.world.issue(CLI), head, stage.cancels(handle), iss=CLI)
    await refused(stage, handle, frame, "ms ago")


@refused_by(
    Layer.RECORD, "a record of the submitter's own cancellation, written by itself", by=Adversary.CALLER
)
async def test_the_submitter_is_no_recorder(stage):
    """What cancels is the agent's record; that of the submitter is none."""
    first = await stage.running()
    second = await stage.queued()
    head = stage.record(second, 0)
    payload = stage.says(second, TaskState.CANCELED)
    await stage.store(second._ref.subject(0), stage.sealed(stage.world.issue(CLI), head, payload, iss=CLI))
    stage.probe.take_turns(2)
    await first.result(PATIENCE)
    await stage.nothing_came_of_it(second)


async def test_the_submitters_own_cancellation(stage):
    """Honest: the same frame, sealed by who may, does cancel."""
    handle = await stage.running()
    frame = stage.sealed(stage.world.issue(CLI), stage.cancel(handle), stage.cancels(handle), iss=CLI)
    await stage.mallory.send(SUBJECT, frame)
    status = await handle.cancel(timeout=PATIENCE)
    assert (status.state, status.message) == (TaskState.CANCELED, "forged")
