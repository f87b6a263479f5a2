"""Attack: an answer after the answer. The first valid one counts, whatever follows it."""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.envelope import Kind
from agentweave_bus.exceptions import CallTimeoutError
from tests.integration.callee import reply_to, result_of
from tests.integration.connections import heard_within, until
from tests.integration.probes import ECHO, PATIENCE, data_of
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio


async def the_other_is_dropped(question):
    """Once an answer that was sent after it has arrived, and long before the callee's own could."""
    await question.mallory.flush()
    await question.cli.ask(ECHO, "say", {"text": "later"})
    assert question.dropped("late") + question.dropped("duplicate") == 1


@refused_by(Layer.CALLER, "a second answer beside the first", by=Adversary.BROKER)
async def test_the_first_of_two_counts(question):
    """Both are truly the callee's, and arrive in one piece: the second finds the call answered."""
    svid = question.world.issue(ECHO)
    first, second = (reply_to(question.message, svid, result_of({"n": n})) for n in (1, 2))
    for one in (first, second):
        await question.mallory.client.publish(question.message.reply, one.frame)
    async with asyncio.timeout(PATIENCE):
        assert data_of(await question.task) == {"n": 1}
    await the_other_is_dropped(question)


@refused_by(Layer.CALLER, "an answer repeated after the call has ended", by=Adversary.BROKER)
async def test_an_answer_again(question):
    recorded = await question.mallory.listen(question.message.reply)
    await question.honest()
    answer = await heard_within(recorded)
    for _ in range(3):
        await question.answer(answer.data)
    await until(lambda: question.dropped("late") == 3, "the drops")
    # A later call is not concerned.
    assert await question.cli.ask(ECHO, "work", {"text": "later"}) == {"worked": "later"}
    question.echo.ran.remove("work")
    assert question.dropped("forged") == question.dropped("duplicate") == 0


@refused_by(Layer.CALLER, "an answer held back until the caller has given up", by=Adversary.BROKER)
async def test_an_answer_after_the_deadline(question):
    await question.honest()
    question.echo.gate.clear()
    overheard = await question.mallory.listen(call_subject(ECHO, "stubborn"))
    with pytest.raises(CallTimeoutError, match="the work may have been done"):
        await question.cli.call(str(ECHO), "stubborn", timeout=0.2)
    question.echo.gate.set()
    await until(lambda: question.dropped("late") == 1, "the callee's own word that its time was up")
    late = await heard_within(overheard)
    await question.mallory.send(late.reply, reply_to(late, question.world.issue(ECHO)).frame)
    await until(lambda: question.dropped("late") == 2, "the drop")


@refused_by(Layer.CALLER, "a refusal after the answer", by=Adversary.BROKER)
async def test_a_refusal_after_the_answer(question):
    svid = question.world.issue(ECHO)
    body = {"step": "authorization", "reason": "no", "audit_id": "a-1"}
    answer = reply_to(question.message, svid, result_of({"n": 1}))
    refusal = reply_to(question.message, svid, body, kind=Kind.REFUSAL)
    for one in (answer, refusal):
        await question.mallory.client.publish(question.message.reply, one.frame)
    async with asyncio.timeout(PATIENCE):
        assert data_of(await question.task) == {"n": 1}
    await the_other_is_dropped(question)
