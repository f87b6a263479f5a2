"""Genuine records out of their place: what an agent signed for one slot, or one history, counts in no other.

All of these frames are the agent's own. Workers that lose a race have sealed them, and whoever owns the
broker has seen them.
"""

from __future__ import annotations

import pytest

from agentweave_bus.tasks.log import TaskLog
from agentweave_bus.types import TaskState
from tests.unit.tasks.conftest import TASK, World, body
from tests.unit.tasks.shared_world import *  # noqa: F403

pytestmark = pytest.mark.anyio


def put(world: World, slot: int, frame: bytes) -> None:
    """Store a frame where only somebody with full rights at the broker can."""
    world.bus.broker.jetstream.streams[world.ref.stream].store(world.ref.subject(slot), frame, None)


async def sealed(log: TaskLog, state: TaskState) -> bytes:
    """What a worker that knows so much of the log would write next."""
    return (await log._sealed(body(state), TASK)).frame


async def states(world: World) -> list[str]:
    log = world.log("client")
    await log.refresh()
    return [str(one.state) for one in log.records]


async def test_an_outcome_that_lost_its_race_counts_in_no_other_slot(world: World) -> None:
    log = world.log()
    await log.append(body(TaskState.WORKING), TASK)
    lost = await sealed(log, TaskState.COMPLETED)
    put(world, 1, b"noise, so that the count of records stays behind that of slots")
    put(world, 2, lost)
    assert await states(world) == ["working"]


async def test_an_outcome_counts_in_no_other_history(world: World) -> None:
    """Two workers began at once. Who owns the broker shows the one's beginning and the other's end."""
    one, other = world.log(), world.log()
    beginning = await sealed(other, TaskState.WORKING)
    await one.append(body(TaskState.WORKING), TASK)
    end = await sealed(one, TaskState.COMPLETED)
    stream = world.bus.broker.jetstream.streams[world.ref.stream]
    kept = stream.last_of(world.ref.subject(0))
    assert kept is not None
    stream._drop(kept.sequence)
    put(world, 0, beginning)
    put(world, 1, end)
    assert await states(world) == ["working"]
