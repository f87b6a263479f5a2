"""Attack: the broker keeps a call to itself, for good or for a while. What it can do so, and what it can't."""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.exceptions import CallTimeoutError
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, PATIENCE, data_of
from tests.security.catalogue import Adversary, refused_by
from tests.security.conftest import counted

pytestmark = pytest.mark.anyio


@pytest.fixture
async def kept(mallory):
    """Calls of ``work`` end here: nobody else listens."""
    return await mallory.listen(call_subject(ECHO, "work"))


async def unanswered(cli):
    """Make a call that times out, and say so clearly."""
    with pytest.raises(CallTimeoutError, match=r"no answer .* in time; the work may have been done"):
        await cli.call(str(ECHO), "work", {"text": "held back"}, timeout=0.6)


@refused_by(Step.TIME, "a call held back until its caller has given up", by=Adversary.BROKER)
async def test_delivered_after_its_deadline(world, cli, mallory, kept):
    await unanswered(cli)
    message = await heard_within(kept)
    echo = await world.agent(ECHO)
    await mallory.send(message.subject, message.data, message.reply)
    refusal = await world.refusal("echo")
    assert (refusal["step"], refusal["step_name"]) == (Step.TIME.number, Step.TIME.label)
    assert "expired" in refusal["reason"]
    assert counted(echo, Step.TIME) == 1
    await cli.ask(ECHO, "work", {"text": "honest"})
    assert echo.ran == ["work"]


async def test_delivered_late_but_in_time(world, cli, mallory, kept):
    """Not protected: delay. Until the caller's deadline, and 30 s at most, a call may come late; once."""
    task = asyncio.create_task(cli.call(str(ECHO), "work", {"text": "late"}, timeout=PATIENCE))
    message = await heard_within(kept)
    echo = await world.agent(ECHO)
    for _ in range(2):
        await mallory.send(message.subject, message.data, message.reply)
    assert data_of(await task) == {"worked": "late"}
    assert (await world.refusal("echo"))["step_name"] == Step.REPLAY.label
    assert echo.ran == ["work"]


async def test_never_delivered(world, cli, mallory, kept):
    """Not protected: dropping. The caller is told no more than that no answer came; both logs show which call."""
    await unanswered(cli)
    await heard_within(kept)
    sent = world.audit("cli", event="call", cap="work")
    assert [one["iss"] for one in sent] == [str(CLI)]
    echo = await world.agent(ECHO)
    await cli.ask(ECHO, "say", {"text": "later"})
    assert echo.ran == ["say"]
    assert sent[0]["digest"] not in {one["digest"] for one in world.audit("echo", event="admission")}


async def test_read_on_the_way(world, cli, mallory, kept):
    """Not protected: reading. TLS ends at the broker, and payloads are signed, not encrypted."""
    await world.agent(ECHO)
    await cli.ask(ECHO, "work", {"text": "not for the broker"})
    assert b"not for the broker" in (await heard_within(kept)).data
