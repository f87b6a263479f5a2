"""Attack: what agents could do to where delayed tasks wait, and to what wakes them."""

from __future__ import annotations

import json

import pytest

from agentweave_bus.bus.streams import parked_stream_name, tasks_stream_name, wakeups_stream
from agentweave_bus.bus.subjects import api_inbox, park_subject, wakeup_subject
from tests.integration.announcing import announce, asked, served
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, OTHER
from tests.security.broker.test_stream_headers import UNWANTED
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio

TOKEN = "D" * 22
WAKEUPS = wakeups_stream(ECHO.trust_domain).name
SCHEDULES = {
    **UNWANTED,
    "at once": {
        "Nats-Schedule": "@at 2020-01-01T00:00:00Z",
        "Nats-Schedule-Target": park_subject(ECHO, "block"),
    },
    "again": {"Nats-Schedule": "@every 1s", "Nats-Schedule-Target": park_subject(ECHO, "block")},
    "purge": {"Nats-Schedule-Next": "purge", "Nats-Scheduler": park_subject(ECHO, "block")},
}


@pytest.fixture(scope="module")
async def raws(session_world):
    """Connections of who may submit to echo, of echo itself, of somebody else, and of the broker's owner."""
    raws = {one: await session_world.raw(one) for one in (CLI, ECHO, OTHER)}
    raws["owner"] = await session_world.raw()
    await announce(raws[ECHO], ECHO, "work")
    await served(raws["owner"], ECHO, "work")
    yield raws
    await asked(raws["owner"], f"$JS.API.STREAM.DELETE.{tasks_stream_name(ECHO)}")
    await session_world.clear()


@refused_by(
    Layer.STREAM, "a JetStream header, a schedule among them, on a task that is parked", by=Adversary.CALLER
)
@pytest.mark.parametrize("name", list(SCHEDULES))
async def test_headers(raws, name):
    answers = await raws[CLI].listen(f"{api_inbox(CLI, TOKEN)}.*")
    before = (await asked(raws["owner"], f"$JS.API.STREAM.INFO.{parked_stream_name(ECHO)}"))["state"]
    await raws[CLI].send(park_subject(ECHO, "work"), b"x" * 40, f"{api_inbox(CLI, TOKEN)}.x", SCHEDULES[name])
    answer = json.loads((await heard_within(answers)).data)
    assert answer["error"]["err_code"] > 0
    after = (await asked(raws["owner"], f"$JS.API.STREAM.INFO.{parked_stream_name(ECHO)}"))["state"]
    assert after["last_seq"] == before["last_seq"]


@refused_by(Layer.PERMISSIONS, "waking, deleting or acknowledging a parked task", by=Adversary.AGENT)
@pytest.mark.parametrize("who", [CLI, ECHO, OTHER], ids=["submitter", "agent", "other"])
async def test_what_only_the_control_role_may(raws, who):
    place = parked_stream_name(ECHO).removeprefix("parked-")
    forbidden = [
        wakeup_subject(ECHO.trust_domain, "due", place, 1),
        wakeup_subject(ECHO.trust_domain, "plan", place, 1),
        f"$JS.API.STREAM.MSG.DELETE.{parked_stream_name(ECHO)}",
        f"$JS.API.STREAM.MSG.GET.{parked_stream_name(ECHO)}",
        f"$JS.API.STREAM.PURGE.{WAKEUPS}",
        f"$JS.API.CONSUMER.MSG.NEXT.{parked_stream_name(ECHO)}.parked",
        f"$JS.ACK.{parked_stream_name(ECHO)}.parked.1.1.1.1.0",
    ]
    if who != CLI:
        forbidden.append(park_subject(ECHO, "work"))
    for subject in forbidden:
        said = await raws[who].denied(raws[who].client.publish(subject, b"{}"))
        assert f'"{subject.lower()}"' in said
