"""Attack: an honest frame, or an honest signature, put where it does not belong."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject, reply_subject
from agentweave_bus.envelope import Kind
from tests.integration.callee import reply_to
from tests.integration.probes import CLI, ECHO, FRONT, OTHER
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio


@refused_by(Step.BINDING, "an honest call, delivered to another agent", by=Adversary.BROKER)
async def test_delivered_to_another_agent(attack):
    front = await attack.world.agent(FRONT)
    await attack.send(attack.message.data, subject=call_subject(FRONT, "relay"))
    record = await attack.world.refusal("front")
    assert record["step_name"] == attack.expected.label
    assert f"addressed to {ECHO}" in record["reason"]
    assert front.ran == []


@refused_by(Step.BINDING, "an honest call, delivered on another capability's subject", by=Adversary.BROKER)
async def test_delivered_on_another_capabilitys_subject(attack):
    await attack.send(attack.message.data, subject=call_subject(ECHO, "boom"))
    await attack.refused(reason="arrived on")


@refused_by(
    Step.BINDING,
    "a call that its sender addressed to another agent, on this one's subject",
    by=Adversary.CALLER,
)
async def test_addressed_to_another_agent(attack):
    """The broker's rights go by the subject; what is signed for another must not run here."""
    svid = attack.world.issue(CLI)
    for aud, sub in ((FRONT, call_subject(ECHO, "work")), (ECHO, call_subject(FRONT, "work"))):
        forged = forged_call(svid, aud=aud, sub=sub)
        await attack.send(forged.frame, reply=reply_of(forged))
    await attack.refused_all(2)


@refused_by(Step.BINDING, "a signed capability that is not the subject's", by=Adversary.CALLER)
async def test_a_capability_that_is_not_the_subjects(attack):
    """The sender signed it so; the broker's rights go by the subject, the handler by the capability."""
    forged = forged_call(attack.world.issue(CLI), cap="boom")
    await attack.send(forged.frame, reply=reply_of(forged))
    await attack.refused(reason="sealed for subject")


NO_REPLY = {"reply": None}
TO_A_DOMAIN = {**NO_REPLY, "aud": "spiffe://demo.test"}
ANSWERS = {**NO_REPLY, "re": b"r" * 32}


def swapped(kind, changes):
    mark = refused_by(Step.BINDING, f"a {kind} sent as a call", by=Adversary.CALLER)
    return pytest.param(kind, changes, id=kind, marks=mark)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        swapped(Kind.TASK, {}),
        swapped(Kind.REISSUE, {}),
        swapped(Kind.CONTROL, {}),
        swapped(Kind.REPLY, ANSWERS),
        swapped(Kind.REFUSAL, ANSWERS),
        swapped(Kind.PROGRESS, {**ANSWERS, "seq": 0}),
        swapped(Kind.EVENT, TO_A_DOMAIN),
        swapped(Kind.RECORD, TO_A_DOMAIN),
    ],
)
async def test_another_kind_than_a_call(attack, kind, changes):
    """Each has all that its own kind asks for, so only what a call is sent for is wrong with it."""
    forged = forged_call(attack.world.issue(CLI), kind=kind, raw=changes)
    await attack.send(forged.frame)
    await attack.refused(reason=f"a {kind} does not travel on a call subject")


@refused_by(Step.BINDING, "an answer sent as a call", by=Adversary.CALLER)
async def test_an_answer_as_a_call(attack):
    answer = reply_to(attack.message, attack.world.issue(CLI), sub=attack.message.subject, aud=ECHO)
    await attack.send(answer.frame)
    await attack.refused(reason="a reply does not travel on a call subject")


@refused_by(Step.BINDING, "the answer aimed at another subject than the caller signed", by=Adversary.BROKER)
async def test_another_reply_subject_than_the_signed_one(attack):
    """The answer must not be aimed at somebody else, nor its caller be made deaf."""
    forged = forged_call(attack.world.issue(CLI))
    for reply in (
        reply_subject(OTHER, "A" * 22, forged.head.id),
        "aw.call.demo=test.agent/echo.work",
        "x",
        "",
    ):
        await attack.send(forged.frame, reply=reply)
    unanswerable = forged_call(attack.world.issue(CLI), raw={"reply": None})
    await attack.send(unanswerable.frame, reply=reply_of(forged))
    await attack.refused_all(5, reason="the reply subject is not the one that was signed")


@refused_by(Step.BINDING, "a payload of another content type", by=Adversary.CALLER)
async def test_another_content_type(attack):
    forged = forged_call(attack.world.issue(CLI), ct="text/plain")
    await attack.send(forged.frame, reply=reply_of(forged))
    await attack.refused(reason="content type")
