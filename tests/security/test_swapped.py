"""Attack: an honest frame, or an honest signature, put where it does not belong."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.subjects import call_subject, reply_subject
from agentweave_bus.envelope import Kind
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO, FRONT, OTHER
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio


async def test_delivered_to_another_agent(attack):
    front = await attack.world.agent(FRONT)
    await attack.send(attack.message.data, subject=call_subject(FRONT, "relay"))
    record = await attack.world.refusal("front")
    assert record["step_name"] == "binding"
    assert f"addressed to {ECHO}" in record["reason"]
    assert front.ran == []


async def test_delivered_on_another_capabilitys_subject(attack):
    await attack.send(attack.message.data, subject=call_subject(ECHO, "boom"))
    record = await attack.refused("binding", reason="arrived on")
    assert record["step"] == 6


async def test_a_capability_that_is_not_the_subjects(attack):
    """The sender signed it so; the broker's rights go by the subject, the handler by the capability."""
    forged = forged_call(attack.world.issue(CLI), cap="boom")
    await attack.send(forged.frame, reply=reply_of(forged))
    await attack.refused("binding", reason="sealed for subject")


@pytest.mark.parametrize("kind", [Kind.TASK, Kind.EVENT, Kind.CONTROL])
async def test_another_kind_than_a_call(attack, kind):
    forged = forged_call(attack.world.issue(CLI), kind=kind)
    await attack.send(forged.frame)
    await until(lambda: len(attack.refusals()) == 1, "the refusal")
    assert attack.refusals()[0]["step_name"] in {"binding", "head"}
    assert attack.echo.ran == ["work"]


async def test_an_answer_as_a_call(attack):
    from tests.integration.callee import reply_to

    answer = reply_to(attack.message, attack.world.issue(CLI), sub=attack.message.subject, aud=ECHO)
    await attack.send(answer.frame)
    await attack.refused("binding", reason="a reply does not travel on a call subject")


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
    await until(lambda: len(attack.refusals()) == 4, "every refusal")
    assert {one["step_name"] for one in attack.refusals()} == {"binding"}
    assert attack.echo.ran == ["work"]


async def test_another_content_type(attack):
    forged = forged_call(attack.world.issue(CLI), ct="text/plain")
    await attack.send(forged.frame, reply=reply_of(forged))
    await attack.refused("binding", reason="content type")
