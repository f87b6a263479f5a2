"""Attack: filling a queue, or the broker's disk, with tasks that nobody has signed."""

from __future__ import annotations

import json
import os

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.streams import dead_stream_name, tasks_stream_name
from agentweave_bus.bus.subjects import task_subject
from agentweave_bus.envelope import Kind
from agentweave_bus.identity import Authority
from agentweave_bus.tasks import unreadable
from tests.integration.connections import heard_within
from tests.integration.dead_letter_cast import *  # noqa: F403
from tests.integration.probes import CLI, DOMAIN, ECHO, PATIENCE
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, with_part

pytestmark = pytest.mark.anyio

QUEUE = task_subject(ECHO, "heal")
PLACES = 4
MANY = 260
BYTES = 20_000
LETTER_BYTES = 6_000


async def dead(cast):
    """The stream of the agent's dead letters, as the broker tells of it."""
    heard = await cast.mallory.listen("probe.dead")
    await cast.mallory.send(f"$JS.API.STREAM.INFO.{dead_stream_name(ECHO)}", b"", "probe.dead")
    return json.loads((await heard_within(heard)).data)


async def every_letter(cast):
    """What is listed, page by page."""
    rows, after = [], None
    while True:
        page = await cast.operator.list(limit=200, after=after)
        rows += page["letters"]
        if (after := page["after"]) is None:
            return rows


async def honest(cast):
    """A task is done while all that is there."""
    cast.probe.well = True
    handle = await cast.cli.client.submit(str(ECHO), "heal", {"name": "honest"})
    assert (await handle.result(PATIENCE)).status == "completed"


@refused_by(
    Step.CHAIN,
    "more tasks of an unknown authority than a worker remembers, to stay there",
    by=Adversary.CALLER,
)
async def test_more_than_are_remembered(sickbed, monkeypatch):
    """Each might be verified later, so it is given back; but none of them for ever."""
    monkeypatch.setattr(unreadable, "_MOST_REMEMBERED", PLACES)
    monkeypatch.setattr(unreadable, "PATIENCE_DELIVERIES", 2)
    raw = await sickbed.world.raw(CLI)
    stranger = Authority(DOMAIN).issue(CLI)
    base = forged_call(stranger, kind=Kind.TASK, cap="heal", sub=QUEUE, reply=None).frame
    for number in range(5 * PLACES):
        frame = with_part(base, "payload", lambda _, number=number: number.to_bytes(8, "big"))
        await raw.client.publish(QUEUE, frame)
    await raw.flush()
    await honest(sickbed)
    assert await sickbed.world.stored(sickbed.mallory, tasks_stream_name(ECHO)) == 5 * PLACES
    monkeypatch.setattr(unreadable, "PATIENCE_S", 0.8)
    await sickbed.idle()
    assert sickbed.probe.ran == ["honest"]


@refused_by(Step.FRAME, "filling the broker's disk with dead letters of bytes at random", by=Adversary.CALLER)
async def test_garbage(sickbed):
    """A few leave a record, none its bytes; and what is given up later has its dead letter as ever."""
    before = (await dead(sickbed))["state"]
    raw = await sickbed.world.raw(CLI)
    for _ in range(MANY):
        await raw.client.publish(QUEUE, os.urandom(BYTES))
    await raw.flush()
    await sickbed.idle()
    told = await dead(sickbed)
    letters = told["state"]["messages"] - before["messages"]
    assert 0 < letters <= 200 < MANY
    assert told["state"]["bytes"] - before["bytes"] < letters * LETTER_BYTES
    assert told["config"]["max_bytes"] > 0
    handle = await sickbed.cli.client.submit(str(ECHO), "heal", {"name": "ann"})
    assert (await handle.result(PATIENCE)).status == "failed"
    (row,) = [one for one in await every_letter(sickbed) if one.get("task", {}).get("id") == handle.id]
    assert row["state"] == "waiting"
    assert (await sickbed.operator.show(row["letter"], payload=True))["payload"] == {"name": "ann"}
