"""Attack: an honest frame, sent again to the process that admitted it."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.streams import claim_stream_name
from agentweave_bus.bus.subjects import call_subject
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

FILTERED = "this envelope was admitted before"


@refused_by(Step.REPLAY, "a call sent again to the process that ran it", by=Adversary.BROKER)
async def test_the_same_frame_again(attack):
    await attack.send(attack.message.data)
    record = await attack.refused(reason=FILTERED)
    assert record["digest"] == attack.world.audit("echo", event="admission", cap="work")[-1]["digest"]


@refused_by(Step.REPLAY, "a call sent again twenty times at once", by=Adversary.BROKER)
async def test_the_same_frame_many_times_at_once(attack):
    """Never the claim's word: the filter answers before the broker is asked at all."""
    before = await attack.world.stored(attack.mallory, claim_stream_name(ECHO))
    for _ in range(20):
        await attack.mallory.client.publish(attack.message.subject, attack.message.data, attack.message.reply)
    await attack.refused_all(20, reason=FILTERED)
    assert await attack.world.stored(attack.mallory, claim_stream_name(ECHO)) == before


@refused_by(
    Step.REPLAY, "a call that no honest call went before, sent twice in one piece", by=Adversary.BROKER
)
async def test_a_frame_and_its_copy_in_one_piece(attack):
    """No order of the two makes both run, and the copy gets no answer of its own."""
    frame = forged_call(attack.world.issue(CLI))
    inbox = await attack.mallory.listen(reply_of(frame))
    for _ in range(2):
        await attack.mallory.client.publish(frame.head.sub, frame.frame, reply_of(frame))
    await heard_within(inbox, "answer")
    record = await attack.world.refusal("echo", after=attack.refused_before, step_name="replay")
    assert (record["step"], record["reason"]) == (Step.REPLAY.number, FILTERED)
    await attack.cli.ask(ECHO, "say", {"text": "later"})
    assert attack.echo.ran == ["work", "work", "say"]
    assert inbox.empty()


@refused_by(Step.REPLAY, "a call of a `safe` capability, sent again to the same process", by=Adversary.BROKER)
async def test_a_safe_call_again(attack):
    """It makes no claim; the filter alone keeps it from running for each copy."""
    heard = await attack.mallory.listen(call_subject(ECHO, "say"))
    await attack.cli.ask(ECHO, "say", {"text": "once"})
    attack.echo.ran.remove("say")
    message = await heard_within(heard)
    await attack.mallory.client.publish(message.subject, message.data, message.reply)
    await attack.refused(reason=FILTERED)


@refused_by(
    Step.REPLAY, "an id that has run, sealed again by the thief of its sender's key", by=Adversary.THIEF
)
async def test_the_same_id_under_another_signature(attack):
    """Every signature is right and the digest is new, so only the claim on the id knows."""
    call_id = attack.message.reply.rpartition(".")[2]
    again = forged_call(attack.world.issue(CLI), id=call_id)
    await attack.send(again.frame, reply=reply_of(again))
    record = await attack.refused(reason="this id is claimed already")
    assert record["id"] == call_id
    assert attack.reflected.empty()
