"""Attack: making an operator who watches believe of tasks what their agent did not record."""

from __future__ import annotations

import json

import pytest

from agentweave_bus.bus.subjects import step_subject
from agentweave_bus.envelope import Kind, control_role, encode_payload, new_id
from agentweave_bus.runtime.operators import Operator
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.record import TaskNamed
from agentweave_bus.tasks.step_log import STEP_TYPE
from agentweave_bus.types import TaskState
from tests.integration.probes import CLI, ECHO, FRONT, MALLORY, OPERATOR, Held
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.task_stage import *  # noqa: F403

pytestmark = pytest.mark.anyio


@pytest.fixture
async def watcher(stage):
    held = await Held.open(Operator(stage.world.config(OPERATOR)))
    yield held.value
    await held.close()


async def all_of(watcher, after=None):
    rows, more = [], True
    while more:
        page = await watcher.observe_records(after, limit=200)
        rows, after, more = rows + page["records"], page["after"], page["more"]
    return rows, after


async def shows_nothing_of_it(stage, watcher, handle, after, why):
    """It is told that something stands there which is not genuine, and none of what that says."""
    rows, _ = await all_of(watcher, after)
    story = await watcher.observe_task(str(ECHO), str(CLI), handle._ref.key)
    for told in (rows, story["records"] + story["steps"]):
        forged = [row for row in told if not row["genuine"]]
        assert len(forged) == 1
        assert set(forged[0]) == {"genuine", "agent", "at", "why"}
        assert why in forged[0]["why"]
    genuine = [row for row in rows if row["genuine"] and row["key"] == handle._ref.key]
    assert [row["state"] for row in genuine] == ["working"]
    assert "forged" not in json.dumps([rows, story])
    stage.probe.take_turns(2)
    assert (await handle.result(15)).data == {"count": 2}


def outcome(stage, handle, svid, iss, **changed):
    head = stage.record(handle, 1, **changed)
    return stage.sealed(svid, head, stage.says(handle, TaskState.COMPLETED), iss=iss)


async def begun(stage, watcher):
    _, after = await all_of(watcher)
    handle = await stage.running()
    await handle.status()
    return handle, after


@pytest.mark.parametrize(
    ("signer", "iss", "why"),
    [
        (MALLORY, MALLORY, "writes of a task"),
        (FRONT, FRONT, "writes of a task"),
        (MALLORY, ECHO, "in the name of"),
        (control_role(ECHO.trust_domain), control_role(ECHO.trust_domain), "may not write"),
    ],
    ids=["one's own name", "another agent", "the agent's name", "the control role"],
)
@refused_by(Layer.CONTROL, "an outcome that an operator who watches is to see", by=Adversary.BROKER)
async def test_an_outcome(stage, watcher, signer, iss, why):
    handle, after = await begun(stage, watcher)
    frame = outcome(stage, handle, stage.world.issue(signer), iss)
    await stage.store(handle._ref.subject(1), frame)
    await shows_nothing_of_it(stage, watcher, handle, after, why)


@refused_by(Layer.CONTROL, "a genuine record in another slot than it was signed for", by=Adversary.BROKER)
async def test_a_copied_record(stage, watcher):
    handle, after = await begun(stage, watcher)
    await stage.store(handle._ref.subject(1), await stage.stands(handle._ref, "record", 0))
    await shows_nothing_of_it(stage, watcher, handle, after, "no record of this place")


@refused_by(Layer.CONTROL, "a first record that names another task, for who watches", by=Adversary.THIEF)
async def test_a_record_that_names_another_task(stage, watcher):
    handle, after = await begun(stage, watcher)
    body = stage.body(handle, TaskState.WORKING, task=TaskNamed(capability="forged", id=handle.id))
    head = stage.record(handle, 1, seq=0, prev=None)
    frame = stage.sealed(stage.world.issue(ECHO), head, body.encoded(), iss=ECHO)
    await stage.store(handle._ref.subject(1), frame)
    rows, _ = await all_of(watcher, after)
    (forged,) = [row for row in rows if not row["genuine"]]
    assert "names another task" in forged["why"]
    assert "forged" not in json.dumps(rows)
    stage.probe.take_turns(2)
    assert (await handle.result(15)).data == {"count": 2}


@refused_by(Layer.CONTROL, "an end that can't follow, in what is told of one task", by=Adversary.THIEF)
async def test_an_end_that_can_not_follow(stage, watcher):
    """The control role's key may end what no attempt has open; that one is open only the story shows."""
    handle, _ = await begun(stage, watcher)
    role = control_role(ECHO.trust_domain)
    body = stage.body(handle, TaskState.CANCELED)
    frame = stage.sealed(stage.world.issue(role), stage.record(handle, 1), body.encoded(), iss=role)
    await stage.store(handle._ref.subject(1), frame)
    story = await watcher.observe_task(str(ECHO), str(CLI), handle._ref.key)
    working, forged = story["records"]
    assert (working["genuine"], working["state"]) == (True, "working")
    assert (forged["genuine"], "may not write" in forged["why"]) == (False, True)
    stage.probe.take_turns(2)
    assert (await handle.result(15)).data == {"count": 2}
    story = await watcher.observe_task(str(ECHO), str(CLI), handle._ref.key)
    assert [row["genuine"] and row["state"] for row in story["records"]] == ["working", False, "completed"]


@refused_by(Layer.CONTROL, "a step that the agent did not take, for who watches", by=Adversary.BROKER)
async def test_a_step(stage, watcher):
    handle, _ = await begun(stage, watcher)
    now_ms = clock_ms()
    place = step_subject(ECHO, handle._ref.key, "forged")
    head = {
        "kind": Kind.RECORD,
        "id": new_id(now_ms),
        "aud": SpiffeID(f"spiffe://{ECHO.trust_domain}"),
        "cap": STEP_TYPE,
        "sub": place,
        "iat": now_ms,
        "exp": now_ms + 60_000,
        "re": bytes.fromhex(handle.digest or ""),
        "att": 1,
    }
    await stage.store(place, stage.sealed(stage.world.issue(FRONT), head, encode_payload({}), iss=FRONT))
    story = await watcher.observe_task(str(ECHO), str(CLI), handle._ref.key)
    assert [step["genuine"] for step in story["steps"]] == [False]
    assert "writes of steps" in story["steps"][0]["why"]
    stage.probe.take_turns(2)
    assert (await handle.result(15)).data == {"count": 2}
