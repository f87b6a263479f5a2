"""Attack: progress and artifacts that the agent of a task did not tell, in the slots where it would."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.subjects import progress_subject
from tests.integration.probes import CLI, ECHO, FRONT, MALLORY, PATIENCE
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.task_stage import *  # noqa: F403

pytestmark = pytest.mark.anyio


async def forge(stage, handle, svid, iss, *, slot=0, **changed):
    frame = stage.sealed(svid, stage.progress(handle, slot, **changed), stage.tells(), iss=iss)
    await put(stage, handle, slot, frame)


async def put(stage, handle, slot, frame):
    await stage.store(progress_subject(ECHO, CLI, handle._ref.key, slot), frame)


@refused_by(Layer.RECORD, "progress in one's own name", by=Adversary.BROKER)
async def test_progress_by_another(stage):
    handle = await stage.running()
    await forge(stage, handle, stage.mallory.source.svid, MALLORY)
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("worker") == 1
    assert stage.foreign("client") == 1


@refused_by(Layer.RECORD, "progress in the agent's name", by=Adversary.BROKER)
async def test_progress_in_the_agents_name(stage):
    handle = await stage.running()
    await forge(stage, handle, stage.mallory.source.svid, ECHO)
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("client") == 1


@refused_by(
    Layer.RECORD, "progress by another agent, which the owner of the broker stores", by=Adversary.AGENT
)
async def test_progress_by_another_agent(stage):
    handle = await stage.running()
    await forge(stage, handle, stage.world.issue(FRONT), FRONT)
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("client") == 1


@refused_by(Layer.RECORD, "progress by the submitter, against whom else may watch", by=Adversary.CALLER)
async def test_progress_by_the_submitter(stage):
    handle = await stage.running()
    await forge(stage, handle, stage.world.issue(CLI), CLI)
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("client") == 1


@pytest.mark.parametrize("offset", [-1, -30, 40], ids=["end", "payload", "head"])
@refused_by(Layer.RECORD, "genuine progress with a byte altered", by=Adversary.BROKER)
async def test_altered_progress(stage, offset):
    done = await stage.finished()
    handle = await stage.running()
    frame = bytearray(await stage.stands(done._ref, "progress", 0))
    frame[offset] ^= 0x01
    await put(stage, handle, 0, bytes(frame))
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("client") == 1


@refused_by(Layer.RECORD, "a genuine artifact of another task, copied", by=Adversary.BROKER)
async def test_a_copied_artifact(stage):
    done = await stage.finished()
    handle = await stage.running()
    await put(stage, handle, 0, await stage.stands(done._ref, "progress", 0))
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("client") == 1


@refused_by(Layer.RECORD, "a genuine artifact of the same task, copied behind itself", by=Adversary.BROKER)
async def test_an_artifact_again(stage):
    done = await stage.finished()
    before = [event async for event in done.events()]
    slots = len([one for one in before if one.kind in ("progress", "artifact")])
    await put(stage, done, slots, await stage.stands(done._ref, "progress", 0))
    again = stage.cli.client.task(done.reference)
    assert [event async for event in again.events()] == before


@refused_by(Layer.RECORD, "an outcome of the agent's, put where its progress stands", by=Adversary.BROKER)
async def test_a_record_as_progress(stage):
    done = await stage.finished()
    handle = await stage.running()
    await put(stage, handle, 0, await stage.stands(done._ref, "record", 1))
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("client") == 1


@refused_by(Layer.RECORD, "what is no progress at all, in front of what is", by=Adversary.BROKER)
async def test_noise(stage):
    handle = await stage.running()
    for slot in range(3):
        await put(stage, handle, slot, b"\xff" * slot)
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("client") == 3


async def test_progress_that_the_broker_withholds(stage):
    """Not protected: progress can be withheld; but whoever watches is told how much of it is missing."""
    done = await stage.finished()
    reader = stage.cli.client.task(done.reference)
    slots, read = reader._desk.slots, type(reader._desk.slots).read

    async def withheld(stream, subject, **options):
        missing = stream.startswith("progress") and not subject.endswith(".0")
        return None if missing else await read(slots, stream, subject, **options)

    slots.read = withheld
    try:
        events = [event async for event in reader.events()]
    finally:
        del slots.read
    told = await stage.cli.client.task(done.reference).result(PATIENCE)
    assert [one.kind for one in events] == ["state", "artifact", "gap", "state"]
    assert events[2].missing >= 2
    assert events[-1].result == told
