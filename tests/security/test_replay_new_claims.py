"""Attack: the memory of which calls ran is destroyed, then a call is sent again.

Whoever owns the broker can remove a stream of claims, or lose the disk that it was on. What was sealed
before the new stream was made might have run, so it does not run again.
"""

from __future__ import annotations

import json

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.streams import claim_stream, claim_stream_name
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.envelope import encode_payload
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, MIDDLE
from tests.security.catalogue import Adversary, refused_by
from tests.security.conftest import counted
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

NEWER = "the claim stream is newer than the call"


async def ask_broker(mallory, verb, body=b""):
    """Ask JetStream about the claims of ``middle``, which no other test uses here."""
    answers = await mallory.listen("probe.claims")
    await mallory.send(f"$JS.API.STREAM.{verb}.{claim_stream_name(MIDDLE)}", body, "probe.claims")
    answer = json.loads((await heard_within(answers)).data)
    assert "error" not in answer, answer
    return answer


async def made_anew(mallory):
    await ask_broker(mallory, "DELETE")
    await ask_broker(mallory, "CREATE", json.dumps(claim_stream(MIDDLE).config).encode())


@pytest.fixture
async def relayed(world, echo, cli, mallory):
    """An honest call that ``middle`` has answered: ``(the agent, the call as it went over the wire)``."""
    middle = await world.agent(MIDDLE)
    heard = await mallory.listen(call_subject(MIDDLE, "relay"))
    await cli.ask(MIDDLE, "relay", {"path": [ECHO], "name": "say", "payload": {"text": "once"}})
    message = await heard_within(heard)
    while not heard.empty():  # asked again: an attack before this one has made the claims young
        message = heard.get_nowait()
    return middle, message


@refused_by(
    Step.REPLAY, "a call sent again to a fresh process after its claim was destroyed", by=Adversary.BROKER
)
async def test_what_is_older_than_the_claims(world, echo, mallory, relayed):
    middle, frame = relayed
    await made_anew(mallory)
    await world.running(middle).stop()
    again = await world.agent(MIDDLE)
    before = len(world.refusals("middle"))
    await mallory.send(frame.subject, frame.data, frame.reply)
    refusal = await world.refusal("middle", after=before)
    assert (refusal["step"], refusal["step_name"]) == (Step.REPLAY.number, Step.REPLAY.label)
    assert refusal["reason"] == NEWER
    assert counted(again, Step.REPLAY) == 1
    assert (middle.ran, again.ran, echo.ran) == (["relay"], [], ["say"])
    assert await world.stored(mallory, claim_stream_name(MIDDLE)) == 0


@refused_by(
    Step.REPLAY,
    "a call to a process that still believes in the claims that were destroyed",
    by=Adversary.BROKER,
)
async def test_a_process_that_outlives_the_claims(world, echo, cli, mallory, relayed):
    """It knows the age of the old stream. The first sequence number of the new one makes it ask again."""
    middle, first = relayed
    await cli.ask(MIDDLE, "relay", {"path": [ECHO], "name": "say", "payload": {"text": "twice"}})
    await made_anew(mallory)
    call_id = first.reply.rpartition(".")[2]
    payload = encode_payload({"path": [ECHO], "name": "say", "payload": {"text": "again"}})
    again = forged_call(
        world.issue(CLI), id=call_id, aud=MIDDLE, cap="relay", sub=first.subject, payload=payload
    )
    before = len(world.refusals("middle"))
    await mallory.send(first.subject, again.frame, reply_of(again))
    refusal = await world.refusal("middle", after=before)
    assert refusal["step"] == Step.REPLAY.number
    assert refusal["reason"] == "the call could not be claimed"
    assert middle.ran == ["relay", "relay"]
    # The next one is measured by the new stream's age.
    other = forged_call(world.issue(CLI), aud=MIDDLE, cap="relay", sub=first.subject, payload=payload)
    await mallory.send(first.subject, other.frame, reply_of(other))
    assert (await world.refusal("middle", after=before + 1))["reason"] == NEWER
    assert middle.ran == ["relay", "relay"]


@refused_by(
    Step.REPLAY,
    "a call sent again to a process that has claimed nothing yet, after its claim was destroyed",
    by=Adversary.BROKER,
)
async def test_a_process_that_has_claimed_nothing(world, echo, mallory, relayed):
    """It has learned the age of the old stream, and no sequence number of it by which it could tell them apart."""
    middle, frame = relayed
    await world.running(middle).stop()
    again = await world.agent(MIDDLE)
    await made_anew(mallory)
    before = len(world.refusals("middle"))
    await mallory.send(frame.subject, frame.data, frame.reply)
    refusal = await world.refusal("middle", after=before)
    assert (refusal["step"], refusal["reason"]) == (Step.REPLAY.number, "the call could not be claimed")
    assert (middle.ran, again.ran, echo.ran) == (["relay"], [], ["say"])
