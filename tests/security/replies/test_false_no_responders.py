"""Attack: the broker says that nobody listens (a 503), which it need not sign, while somebody does.

The caller asks again with the same id, also for work that must not be done twice: where nobody was, nothing
was done. When that was a lie the claim on the id keeps it harmless.
"""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.exceptions import NoResponderError
from tests.integration.callee import request_of
from tests.integration.connections import heard_within, until
from tests.integration.probes import CLI, ECHO, PATIENCE
from tests.integration.world import Caller
from tests.security.catalogue import Adversary, refused_by

pytestmark = pytest.mark.anyio

NOBODY = {"Status": "503"}


@refused_by(Step.REPLAY, "a false 'nobody listens' that makes a caller ask again", by=Adversary.BROKER)
async def test_the_work_is_done_once_and_its_answer_counts(question):
    await question.answer(b"", NOBODY)
    second = await heard_within(question.overheard, "second attempt")
    assert request_of(second)[0].id == request_of(question.message)[0].id
    assert request_of(second)[1] != request_of(question.message)[1]
    await until(lambda: len(question.refusals()) == 1, "the second attempt's refusal")
    refusal = question.refusals()[0]
    assert (refusal["step"], refusal["step_name"]) == (Step.REPLAY.number, Step.REPLAY.label)
    assert refusal["reason"] == "this id is claimed already"
    await question.honest()
    assert all(question.dropped(reason) == 0 for reason in ("late", "duplicate", "forged"))


@refused_by(Step.REPLAY, "one false 'nobody listens' after another", by=Adversary.BROKER)
async def test_many_of_them(question):
    digests = {request_of(question.message)[1]}
    for number in range(1, 4):
        await question.answer(b"", NOBODY)
        again = await heard_within(question.overheard, "another attempt")
        digests.add(request_of(again)[1])
        await until(lambda number=number: len(question.refusals()) == number, "the attempt's refusal")
    assert len(digests) == 4
    assert {one["reason"] for one in question.refusals()} == {"this id is claimed already"}
    assert {one["id"] for one in question.refusals()} == {request_of(question.message)[0].id}
    await question.honest()


async def test_a_broker_that_keeps_saying_so_wins_time_only(question):
    """Not protected: the caller gives up after ``bus.retry.patience`` and is told that nobody was there.

    That the work was done all the same stands in the callee's audit log, and nowhere else.
    """
    await question.honest()
    question.echo.gate.clear()
    question.echo.entered.clear()
    question.echo.ran.clear()
    impatient = await question.world.client(CLI, bus__retry__patience=0.2)
    refused = await denied_every_attempt(question, impatient)
    assert question.echo.ran == ["wait"]
    outcomes = question.world.audit("echo", event="admission", cap="wait")
    assert outcomes[-1]["id"] == refused.pop()
    assert not refused


async def denied_every_attempt(question, caller: Caller) -> set[str]:
    """Answer each attempt of a call by "nobody listens"; return the ids that it was made with."""
    ids = set()
    task = asyncio.create_task(caller.call(str(ECHO), "wait", timeout=PATIENCE))
    while not task.done():
        hearing = asyncio.create_task(question.overheard.get())
        await asyncio.wait({task, hearing}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        if not hearing.done():
            hearing.cancel()
            break
        message = hearing.result()
        ids.add(request_of(message)[0].id)
        async with asyncio.timeout(PATIENCE):
            await question.echo.entered.wait()
        await question.mallory.send(message.reply, b"", headers=NOBODY)
    with pytest.raises(NoResponderError, match="at the moment"):
        await task
    return ids
