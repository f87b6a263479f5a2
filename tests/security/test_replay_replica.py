"""Attack: an honest frame, sent to a replica that has not seen it. Only what replicas share can know."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.streams import claim_stream_name
from agentweave_bus.bus.subjects import call_subject
from tests.integration.connections import heard_within, until
from tests.integration.probes import ECHO
from tests.security.catalogue import Adversary, refused_by
from tests.security.conftest import counted

pytestmark = pytest.mark.anyio

CLAIMED = "this id is claimed already"


async def captured(cli, mallory, name="work"):
    """An honest call that has been answered, as it went over the wire."""
    heard = await mallory.listen(call_subject(ECHO, name))
    await cli.ask(ECHO, name, {"text": "once"})
    return await heard_within(heard)


@refused_by(Step.REPLAY, "a call sent again to another replica", by=Adversary.BROKER)
async def test_a_second_replica(world, echo, cli, mallory):
    frame = await captured(cli, mallory)
    answers = await mallory.listen(frame.reply)
    await world.running(echo).stop()
    replica = await world.agent(ECHO)
    await mallory.send(frame.subject, frame.data, frame.reply)
    refusal = await world.refusal("echo")
    assert (refusal["step"], refusal["step_name"]) == (Step.REPLAY.number, Step.REPLAY.label)
    assert refusal["reason"] == CLAIMED
    assert counted(replica, Step.REPLAY) == 1
    await cli.ask(ECHO, "say", {"text": "later"})
    assert (echo.ran, replica.ran) == (["work"], ["say"])
    assert answers.empty()


@refused_by(Step.REPLAY, "a call dealt out to several replicas at once", by=Adversary.BROKER)
async def test_two_replicas_at_the_same_time(world, cli, mallory):
    replicas = [await world.agent(ECHO) for _ in range(2)]
    frame = await captured(cli, mallory)
    for _ in range(20):  # the queue group deals them out at random
        await mallory.client.publish(frame.subject, frame.data, frame.reply)
    await mallory.flush()
    await until(lambda: len(world.refusals("echo", step_name="replay")) == 20, "20 refusals")
    assert sum(len(one.ran) for one in replicas) == 1
    reasons = {one["reason"] for one in world.refusals("echo")}
    assert reasons == {CLAIMED, "this envelope was admitted before"}


async def test_a_safe_call_runs_on_each_replica(world, echo, cli, mallory):
    """Not protected, and not meant to be: what is declared ``safe`` may run again, once in each process."""
    frame = await captured(cli, mallory, "say")
    before = await world.stored(mallory, claim_stream_name(ECHO))
    await world.running(echo).stop()
    replica = await world.agent(ECHO)
    for _ in range(2):
        await mallory.send(frame.subject, frame.data, frame.reply)
    await world.refusal("echo", reason="this envelope was admitted before")
    assert (echo.ran, replica.ran) == (["say"], ["say"])
    assert await world.stored(mallory, claim_stream_name(ECHO)) == before
