"""Attack: an honest frame, sent again after the worker or the broker was started anew."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.streams import claim_stream, claim_stream_name
from agentweave_bus.bus.subjects import call_subject
from tests.integration.connections import heard_within, until
from tests.integration.probes import CLI, ECHO
from tests.integration.processes import worker_process
from tests.integration.world import World
from tests.security.catalogue import Adversary, refused_by

pytestmark = pytest.mark.anyio


async def captured(cli, mallory):
    """An honest call that has been answered, as it went over the wire."""
    heard = await mallory.listen(call_subject(ECHO, "work"))
    await cli.ask(ECHO, "work", {"text": "once"})
    return await heard_within(heard)


@refused_by(Step.REPLAY, "a call sent again after its worker's restart", by=Adversary.BROKER)
async def test_a_restarted_worker_process(world, cli, mallory):
    async with worker_process(world, ECHO) as worker:
        frame = await captured(cli, mallory)
        worker.process.terminate()
        assert await worker.wait() == 0
    async with worker_process(world, ECHO):
        await mallory.send(frame.subject, frame.data, frame.reply)
        refusal = await world.refusal("echo")
    assert (refusal["step"], refusal["step_name"]) == (Step.REPLAY.number, Step.REPLAY.label)
    assert refusal["reason"] == "this id is claimed already"
    assert len(world.audit("echo", event="admission")) == 1


@refused_by(Step.REPLAY, "a call sent again after the broker's restart without its disk", by=Adversary.BROKER)
@pytest.mark.slow
async def test_a_broker_that_has_lost_its_streams(tmp_path):
    """The streams are made anew, and empty. Calls from before are refused, those from after are served."""
    async with World.make(tmp_path) as world:
        echo, cli, mallory = await world.agent(ECHO), await world.client(CLI), await world.raw()
        frame = await captured(cli, mallory)
        await world.stack.nats.kill()
        shutil.rmtree(tmp_path / "state" / "broker" / "streams")
        await world.stack.nats.start()
        again = await world.raw()
        made = await again.listen("probe.made")
        body = json.dumps(claim_stream(ECHO).config).encode()
        await again.send(f"$JS.API.STREAM.CREATE.{claim_stream_name(ECHO)}", body, "probe.made")
        assert "error" not in json.loads((await heard_within(made)).data)
        # A process that has not seen the call, so that only the age of the claims can know.
        await world.running(echo).crash()
        replica = await world.agent(ECHO)
        await again.send(frame.subject, frame.data, frame.reply)
        refusal = await world.refusal("echo", step_name="replay")
        assert refusal["reason"] == "the claim stream is newer than the call"
        assert replica.ran == []
        await until(lambda: cli.parts.keeper.connected, "the caller's new connection")
        async with asyncio.timeout(20):
            assert await cli.ask(ECHO, "work", {"text": "after"}) == {"worked": "after"}
        assert replica.ran == ["work"]
