"""What remains to who owns the broker where calls are claimed: the limits that docs/security.md states.

He alone keeps the claims, so he can forget them. He can't forge, alter or redirect: the rest of this suite.
"""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.streams import claim_stream_name
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.exceptions import CallRefusedError
from tests.integration.callee import request_of
from tests.integration.connections import heard_within, until
from tests.integration.probes import CLI, ECHO, PATIENCE, data_of
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio


@pytest.fixture
async def generous(deceived):
    """The broker grants every claim, however often."""
    sequence = iter(range(10**15, 10**16))
    deceived.liar.acknowledge = lambda _: {"stream": claim_stream_name(ECHO), "seq": next(sequence)}
    return deceived


async def test_a_claim_granted_twice(generous, cli_frame):
    """Not protected: a captured call runs again on another replica, within 30 s of its signing."""
    world, mallory = generous.liar.world, generous.liar.raw
    frame = await cli_frame("work")
    assert generous.echo.ran == ["work"]
    # The same process refuses it whatever the broker says.
    await mallory.send(frame.subject, frame.data, frame.reply)
    await until(lambda: len(generous.refusals()) == 1, "the refusal")
    assert generous.refusals()[0]["reason"] == "this envelope was admitted before"
    replicas = [generous.echo, await world.agent(ECHO)]
    async with asyncio.timeout(PATIENCE):
        while not replicas[1].ran:  # the queue group deals them out at random
            await mallory.send(frame.subject, frame.data, frame.reply)
            await asyncio.sleep(0.005)
    assert [one.ran for one in replicas] == [["work"], ["work"]]
    await world.running(replicas[1]).stop()


@pytest.fixture
def cli_frame(generous):
    """Make an honest call and return it as it went over the wire."""

    async def make(name):
        heard = await generous.liar.raw.listen(call_subject(ECHO, name))
        await generous.cli.ask(ECHO, name, {"text": "once"})
        return await heard_within(heard)

    return make


@refused_by(
    Step.REPLAY,
    "a false 'nobody listens', then a claim kept from the callee, so that the caller asks anew",
    by=Adversary.BROKER,
)
async def test_nobody_there_and_then_not_ready(deceived):
    """Only the first lie is unsigned; the second makes the callee refuse in good faith.

    To the caller it looks as if nothing had run, but it keeps the id, and the id is claimed.
    """
    liar, echo = deceived.liar, deceived.echo
    heard, first, task = await asked_to_wait(deceived, deceived.cli)
    honest, liar.acknowledge = liar.acknowledge, lambda _: b"unclear"
    await liar.raw.send(first.reply, b"", headers={"Status": "503"})
    second = await heard_within(heard)
    await until(lambda: len(deceived.refusals()) == 1, "the second attempt's refusal")
    liar.acknowledge = honest
    third = await heard_within(heard)
    assert len({request_of(message)[0].id for message in (first, second, third)}) == 1
    await until(lambda: len(deceived.refusals()) == 2, "the third attempt's refusal")
    refusal = deceived.refusals()[1]
    assert (refusal["step"], refusal["reason"]) == (Step.REPLAY.number, "this id is claimed already")
    echo.gate.set()
    assert data_of(await task) == {"waited": True}  # the first attempt's answer, and it counts
    assert echo.ran == ["wait"]


@refused_by(
    Layer.CALLER,
    "a false 'nobody listens', then a claim kept from the callee until the caller gives up",
    by=Adversary.BROKER,
)
async def test_nobody_there_and_then_never_ready(deceived):
    """Whoever called is not told that nothing ran, nor when to call again."""
    impatient = await deceived.liar.world.client(CLI, bus__retry__attempts=1)
    _, first, task = await asked_to_wait(deceived, impatient)
    deceived.liar.acknowledge = lambda _: b"unclear"
    await deceived.liar.raw.send(first.reply, b"", headers={"Status": "503"})
    with pytest.raises(CallRefusedError, match="may have been received all the same") as refused:
        await task
    assert refused.value.retry_after is None
    deceived.echo.gate.set()
    assert deceived.echo.ran == ["wait"]


async def asked_to_wait(deceived, caller):
    """Have ``caller`` ask for what takes until the gate opens, and see it begin."""
    heard = await deceived.liar.raw.listen(call_subject(ECHO, "wait"))
    deceived.echo.gate.clear()
    deceived.echo.entered.clear()
    task = asyncio.create_task(caller.call(str(ECHO), "wait", timeout=PATIENCE))
    first = await heard_within(heard)
    async with asyncio.timeout(PATIENCE):
        await deceived.echo.entered.wait()
    return heard, first, task
