"""Attack: the broker's answer to a claim is false. What is not clearly a yes to this very claim runs nothing."""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.bus import claims
from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import api_inbox
from agentweave_bus.exceptions import CallRefusedError
from tests.integration.callee import replaced
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, PATIENCE, data_of
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

FULL = "maximum messages per subject exceeded"
UNCLEAR = {
    "a duplicate": {"stream": "s", "seq": 10**15, "duplicate": True},
    "no sequence": {"stream": "s"},
    "sequence zero": {"stream": "s", "seq": 0},
    "sequence true": {"stream": "s", "seq": True},
    "sequence as text": {"stream": "s", "seq": "7"},
    "an error and a sequence": {"stream": "s", "seq": 10**15, "error": {"code": 500, "err_code": 1}},
    "another error": {"error": {"code": 503, "err_code": 10077, "description": "maximum messages exceeded"}},
    "an empty error": {"seq": 10**15, "error": {}},
    "a list": b"[1]",
    "very deep": b"[" * 100_000,
    "no JSON": b"+OK",
    "nothing": b"",
}


@refused_by(Step.REPLAY, "an acknowledgement of a claim that is no clear yes", by=Adversary.BROKER)
@pytest.mark.parametrize("said", list(UNCLEAR))
async def test_an_answer_that_is_no_clear_yes(deceived, said):
    deceived.liar.acknowledge = lambda _: UNCLEAR[said]
    with pytest.raises(CallRefusedError) as refusal:
        await deceived.cli.call(str(ECHO), "work", {"text": "x"}, timeout=0.9)
    assert (refusal.value.step, refusal.value.retry_after) == ("replay", 1.0)
    record = deceived.refusals()[0]
    assert (record["step"], record["step_name"]) == (Step.REPLAY.number, Step.REPLAY.label)
    assert record["reason"] == "the call could not be claimed"
    assert deceived.echo.ran == []


@refused_by(Step.REPLAY, "a claim that is never acknowledged", by=Adversary.BROKER)
async def test_no_answer(deceived):
    deceived.liar.acknowledge = lambda _: None
    with replaced(claims, "_TIMEOUT_S", 0.1), pytest.raises(CallRefusedError):
        await deceived.cli.call(str(ECHO), "work", {"text": "x"}, timeout=0.9)
    assert deceived.refusals()[0]["reason"] == "the call could not be claimed"
    assert deceived.echo.ran == []


@refused_by(
    Layer.CALLER,
    "a stored-acknowledgement on another inbox subject than the claim asked with",
    by=Adversary.BROKER,
)
async def test_an_acknowledgement_where_nobody_asked(deceived):
    """It counts only on the very subject that was asked with, which nobody can guess."""
    yes = b'{"stream":"s","seq":999999999999999}'

    async def elsewhere(message):
        inbox, _, token = message.reply.rpartition(".")
        await deceived.liar.raw.client.publish(f"{inbox}.{token[::-1]}", yes)
        await deceived.liar.raw.client.publish(f"{inbox}.{'A' * 22}", yes)

    answering = set()
    deceived.liar.acknowledge = lambda one: answering.add(asyncio.ensure_future(elsewhere(one)))
    with replaced(claims, "_TIMEOUT_S", 0.2), pytest.raises(CallRefusedError):
        await deceived.cli.call(str(ECHO), "work", {"text": "x"}, timeout=0.9)
    assert len(answering) == 1
    assert deceived.echo.ran == []


@refused_by(
    Layer.PERMISSIONS, "a stored-acknowledgement from another agent on a worker's inbox", by=Adversary.AGENT
)
async def test_no_agent_may_publish_there(deceived):
    subject = deceived.liar.claims[-1].reply
    assert subject.startswith(api_inbox(ECHO, subject.split(".")[4]))
    for who in (CLI, ECHO):
        raw = await deceived.liar.world.raw(who)
        said = await raw.denied(raw.client.publish(subject, b'{"stream":"s","seq":1}'))
        assert subject.lower() in said


@refused_by(Step.REPLAY, "an honest claim that the broker says somebody holds already", by=Adversary.BROKER)
async def test_a_false_no(deceived):
    """It can keep a call from running, as by dropping it; the refusal stands in the callee's log."""
    claimed = {"error": {"code": 503, "err_code": 10077, "description": FULL}}
    deceived.liar.acknowledge = lambda _: claimed
    forged = forged_call(deceived.liar.world.issue(CLI))
    await deceived.liar.raw.send(forged.head.sub, forged.frame, reply_of(forged))
    await until(lambda: len(deceived.refusals()) == 1, "the refusal")
    assert deceived.refusals()[0]["reason"] == "this id is claimed already"
    assert deceived.echo.ran == []


@refused_by(
    Step.REPLAY, "an acknowledgement with a sequence number that was there before", by=Adversary.BROKER
)
async def test_a_sequence_that_does_not_grow(deceived):
    """Late, or of a stream made anew: then its age decides, and the broker is asked for it."""
    deceived.liar.acknowledge = lambda _: {"stream": "s", "seq": 1}
    assert data_of(await deceived.cli.call(str(ECHO), "work", {"text": "same age"}, timeout=PATIENCE))
    assert deceived.echo.ran == ["work"]
    deceived.liar.created = lambda: {"created": "2024-06-01T00:00:00Z"}
    with pytest.raises(CallRefusedError):
        await deceived.cli.call(str(ECHO), "work", {"text": "another age"}, timeout=0.9)
    assert deceived.refusals()[0]["reason"] == "the call could not be claimed"
    assert deceived.echo.ran == ["work"]
