"""Attack: records of a durable task that its agent did not write, in the very slots where it would.

Only who owns the broker can write there; other agents may not. He takes the slot after ``working``, or the
first one of a task that waits, and everybody else has to be as if it were not there: the submitter learns
nothing from it, and the worker neither ends nor forgets the task.
"""

from __future__ import annotations

import pytest

from agentweave_bus.envelope import control_role
from agentweave_bus.types import TaskState
from tests.integration.announcing import asked
from tests.integration.probes import CLI, ECHO, FRONT, MALLORY, PATIENCE
from tests.integration.world import World
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.task_stage import *  # noqa: F403

pytestmark = pytest.mark.anyio

ENDS = [TaskState.COMPLETED, TaskState.CANCELED]


async def begun(stage):
    """A task that runs, with its first record known to its handle."""
    handle = await stage.running()
    assert (await handle.status()).state is TaskState.WORKING
    return handle


async def forge(stage, handle, svid, iss, *, state=TaskState.COMPLETED, slot=1, **changed):
    head = stage.record(handle, slot, **changed)
    frame = stage.sealed(svid, head, stage.says(handle, state), iss=iss)
    await stage.store(handle._ref.subject(slot), frame)


@pytest.mark.parametrize("state", ENDS)
@refused_by(Layer.RECORD, "an outcome of a task that runs, in one's own name", by=Adversary.BROKER)
async def test_an_outcome_by_another(stage, state):
    handle = await begun(stage)
    await forge(stage, handle, stage.mallory.source.svid, MALLORY, state=state)
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("worker") == 1
    assert stage.foreign("client") >= 1


@pytest.mark.parametrize("state", ENDS)
@refused_by(Layer.RECORD, "an outcome of a task that runs, in its agent's name", by=Adversary.BROKER)
async def test_an_outcome_in_the_agents_name(stage, state):
    handle = await begun(stage)
    await forge(stage, handle, stage.mallory.source.svid, ECHO, state=state)
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("worker") == 1


@refused_by(
    Layer.RECORD, "an outcome by another agent, which the owner of the broker stores", by=Adversary.AGENT
)
async def test_an_outcome_by_another_agent(stage):
    handle = await begun(stage)
    await forge(stage, handle, stage.world.issue(FRONT), FRONT)
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("worker") == 1


@refused_by(
    Layer.RECORD, "an outcome by the submitter, to be believed by the agent itself", by=Adversary.CALLER
)
async def test_an_outcome_by_the_submitter(stage):
    handle = await begun(stage)
    await forge(stage, handle, stage.world.issue(CLI), CLI)
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("worker") == 1


@pytest.mark.parametrize("state", [TaskState.COMPLETED, TaskState.CANCELED])
@refused_by(
    Layer.RECORD,
    "an end that the control role signed, of a task that an attempt has open",
    by=Adversary.THIEF,
)
async def test_an_end_by_the_control_role(stage, state):
    handle = await begun(stage)
    role = control_role(ECHO.trust_domain)
    await forge(stage, handle, stage.world.issue(role), role, state=state)
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("worker") == 1


@pytest.mark.parametrize("offset", [-1, -60, 40, 400], ids=["end", "payload", "head", "further in the head"])
@refused_by(Layer.RECORD, "a genuine record with a byte altered", by=Adversary.BROKER)
async def test_an_altered_record(stage, offset):
    done = await stage.finished()
    handle = await begun(stage)
    frame = bytearray(await stage.stands(done._ref, "record", 1))
    frame[offset] ^= 0x01
    await stage.store(handle._ref.subject(1), bytes(frame))
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("worker") == 1


@refused_by(Layer.RECORD, "the genuine outcome of another task, copied", by=Adversary.BROKER)
async def test_a_copied_outcome(stage):
    done = await stage.finished()
    handle = await begun(stage)
    await stage.store(handle._ref.subject(1), await stage.stands(done._ref, "record", 1))
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("worker") == 1


@refused_by(Layer.RECORD, "a genuine record of the same task, copied into the next slot", by=Adversary.BROKER)
async def test_a_record_again(stage):
    handle = await begun(stage)
    await stage.store(handle._ref.subject(1), await stage.stands(handle._ref, "record", 0))
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("worker") == 1


@refused_by(Layer.RECORD, "records from years ahead, one after the other", by=Adversary.BROKER)
async def test_records_from_the_future(stage):
    handle = await begun(stage)
    ahead = {"iat": 2**48, "exp": 2**48 + 60_000}
    for slot in (1, 2, 3):
        await forge(stage, handle, stage.mallory.source.svid, MALLORY, slot=slot, **ahead)
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("worker") == 3


@refused_by(Layer.RECORD, "what is no record at all", by=Adversary.BROKER)
async def test_noise(stage):
    handle = await begun(stage)
    for slot, noise in enumerate((b"", b"\xff" * 100, b"{}"), 1):
        await stage.store(handle._ref.subject(slot), noise)
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("worker") == 3


@pytest.mark.parametrize("state", ENDS)
@refused_by(Layer.RECORD, "an outcome of a task that waits, so that it is never begun", by=Adversary.BROKER)
async def test_an_outcome_before_the_beginning(stage, state):
    first = await stage.running()
    second = await stage.queued()
    await forge(stage, second, stage.mallory.source.svid, ECHO, state=state, slot=0)
    assert (await second.status()).state is TaskState.SUBMITTED
    stage.probe.take_turns(2)
    assert (await first.result(PATIENCE)).data == {"count": 2}
    stage.probe.entered.clear()
    await stage.nothing_came_of_it(second)
    assert stage.probe.ran == ["pieces", "pieces"]
    assert stage.foreign("worker") == 1


async def test_a_log_that_the_broker_forgets(tmp_path):
    """Not protected: who owns the broker can take a log away, and a task of the same key runs again.

    On a stack of its own: what other tests cancelled, and what is still in its queue, would run again, too.
    """
    async with World.make(tmp_path) as world:
        probe, cli, mallory = await world.agent(ECHO), await world.client(CLI), await world.raw()
        submit = cli.client.submit
        handle = await submit(str(ECHO), "work", {"text": "a"}, idempotency_key="forgotten")
        assert (await handle.result(PATIENCE)).data == {"worked": "a"}
        stream = handle._ref.stream
        config = (await asked(mallory, f"$JS.API.STREAM.INFO.{stream}"))["config"]
        await asked(mallory, f"$JS.API.STREAM.DELETE.{stream}")
        assert "error" not in await asked(mallory, f"$JS.API.STREAM.CREATE.{stream}", config)
        # What it is told now is old, and it can't know; a handle that knows more is not deceived.
        assert (await cli.client.task(handle.reference).status()).state is TaskState.SUBMITTED
        assert (await handle.status()).state is TaskState.COMPLETED
        again = await submit(str(ECHO), "work", {"text": "a"}, idempotency_key="forgotten")
        assert (await again.result(PATIENCE)).data == {"worked": "a"}
        assert probe.ran == ["work", "work"]


async def test_a_record_that_the_broker_withholds(stage):
    """Not protected: who owns the broker can withhold an outcome from its submitter; he has no other to show."""
    handle = await begun(stage)
    stage.probe.take_turns(2)
    assert (await handle.result(PATIENCE)).data == {"count": 2}
    reader = stage.cli.client.task(handle.reference)
    slots, read = reader._desk.slots, type(reader._desk.slots).read

    async def withheld(stream, subject, **options):
        return None if subject.endswith(".1") else await read(slots, stream, subject, **options)

    slots.read = withheld
    try:
        assert (await reader.status()).state is TaskState.WORKING
    finally:
        del slots.read
    assert (await reader.status()).state is TaskState.COMPLETED
