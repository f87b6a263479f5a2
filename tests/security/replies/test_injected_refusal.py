"""Attack: a refusal is put in while the real answer is under way. The real answer must still be the one."""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.envelope import Kind, encode_payload
from tests.integration.callee import reply_to, request_of
from tests.integration.connections import heard_within
from tests.integration.probes import ECHO, MALLORY, data_of
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio

BODY = {"step": "payload", "reason": "wrong", "audit_id": "a-1"}


@refused_by(Layer.CALLER, "an unsigned refusal while the real answer is under way", by=Adversary.BROKER)
@pytest.mark.parametrize("headers", [None, {"Status": "503"}, {"Status": "408"}], ids=str)
async def test_an_unsigned_refusal(question, headers):
    await question.answer(encode_payload(BODY), headers)
    await question.all_dropped()


@refused_by(
    Layer.CALLER, "a refusal that another has signed, with the real answer at its heels", by=Adversary.BROKER
)
async def test_a_refusal_just_before_the_answer(question):
    forged = reply_to(question.message, question.world.issue(MALLORY), BODY, kind=Kind.REFUSAL)
    question.echo.gate.set()  # the real answer is on its way from now on
    for _ in range(20):
        await question.mallory.client.publish(question.message.reply, forged.frame)
    await question.honest()
    assert question.dropped("forged") + question.dropped("late") + question.dropped("duplicate") <= 20


@refused_by(Layer.CALLER, "the callee's genuine refusal of another request", by=Adversary.BROKER)
async def test_a_refusal_of_another_request(question):
    """The callee refused something else of the same caller: the digest says that it was not this."""
    forged = reply_to(question.message, question.world.issue(ECHO), BODY, kind=Kind.REFUSAL, re=b"\2" * 32)
    await question.answer(forged.frame)
    await question.all_dropped()


@refused_by(
    Layer.CALLER, "one attempt's genuine refusal, held back for the next attempt", by=Adversary.BROKER
)
async def test_one_attempts_refusal_does_not_end_the_other(question):
    """A safe call without an answer is made again, so two attempts are in flight: one refused, one not."""
    await question.honest()
    question.echo.gate.clear()
    heard = await question.mallory.listen(call_subject(ECHO, "wait_safe"))
    task = asyncio.create_task(question.cli.call(str(ECHO), "wait_safe", timeout=2, safe=True))
    first, second = await heard_within(heard), await heard_within(heard, "second attempt")
    assert request_of(first)[1] != request_of(second)[1]
    refusal = reply_to(first, question.world.issue(ECHO), BODY, kind=Kind.REFUSAL)
    await question.mallory.send(first.reply, refusal.frame)
    assert await question.cli.ask(ECHO, "say", {"text": "later"}) == {"said": "later"}
    assert not task.done()
    question.echo.gate.set()
    assert data_of(await task) == {"waited": True}
    assert question.dropped("forged") == 0
