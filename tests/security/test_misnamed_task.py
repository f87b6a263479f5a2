"""Attack: a task's first record that names another capability or task than its key is of."""

from __future__ import annotations

import pytest

from agentweave_bus.envelope import new_id
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.tasks.record import TaskNamed
from agentweave_bus.types import TaskState
from tests.integration.probes import ECHO, PATIENCE
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.task_stage import *  # noqa: F403

pytestmark = pytest.mark.anyio


async def misnamed(stage, handle, slot, **head):
    """An end of a task, signed with the agent's own key, that names another one."""
    body = stage.body(handle, TaskState.REJECTED, task=head.pop("task"))
    frame = stage.sealed(
        stage.world.issue(ECHO), stage.record(handle, slot, **head), body.encoded(), iss=ECHO
    )
    await stage.store(handle._ref.subject(slot), frame)


@pytest.mark.parametrize("other", ["capability", "id"])
@refused_by(Layer.RECORD, "a first record that names another task than its own", by=Adversary.THIEF)
async def test_a_first_record_that_names_another_task(stage, other):
    first = await stage.running()
    second = await stage.queued()
    named = {"capability": "pieces", "id": second.id}
    named[other] = {"capability": "work", "id": new_id(clock_ms())}[other]
    await misnamed(stage, second, 0, task=TaskNamed(**named))
    assert (await second.status()).state is TaskState.SUBMITTED
    stage.probe.take_turns(2)
    await first.result(PATIENCE)
    stage.probe.entered.clear()
    await stage.nothing_came_of_it(second)
    assert stage.foreign("worker") == 1


@refused_by(Layer.RECORD, "a later record that names the task, as only the first does", by=Adversary.THIEF)
async def test_a_later_record_that_names_the_task(stage):
    handle = await stage.running()
    await handle.status()
    await misnamed(stage, handle, 1, task=TaskNamed(capability="pieces", id=handle.id))
    await stage.nothing_came_of_it(handle)
    assert stage.foreign("worker") == 1
