"""Which answer counts: the first that its callee signed for this very request. Others are dropped, counted.

The callee is played by the test, which holds the callee's own SVID for the honest answers.
"""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.envelope import Kind
from agentweave_bus.exceptions import AuthorizationError, CallRefusedError, NoResponderError
from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.callee import reply_to, request_of, result_of
from tests.integration.connections import heard_within, until
from tests.integration.probes import CLI, ECHO, MALLORY, OTHER, PATIENCE, data_of
from tests.unit.envelope.world import sign_head

pytestmark = pytest.mark.anyio


@pytest.fixture
async def asked(world, cli, mallory):
    """A call that waits for its answer: ``(the call's task, its message)``."""
    heard = await mallory.listen(call_subject(ECHO, "work"))
    task = asyncio.create_task(cli.call(str(ECHO), "work", {"text": "x"}, timeout=PATIENCE))
    yield task, await heard_within(heard)
    if not task.done():
        task.cancel()
        await asyncio.wait({task})


async def honest(world, mallory, asked):
    """Give the honest answer, and show that it is the one that counts."""
    task, message = asked
    answer = reply_to(message, world.issue(ECHO), result_of({"answer": "honest"}))
    await mallory.send(message.reply, answer.frame)
    assert data_of(await task) == {"answer": "honest"}


async def test_an_answer_is_bound_to_the_digest_of_its_request(world, mallory, asked, cli):
    await honest(world, mallory, asked)
    assert sum(cli.dropped(reason) for reason in ("late", "duplicate", "forged")) == 0


FORGERIES = {
    "another agent": lambda world, message: reply_to(message, world.issue(OTHER)),
    "the broker": lambda world, message: reply_to(message, world.issue(MALLORY)),
    "the caller itself": lambda world, message: reply_to(message, world.issue(CLI)),
    "another request": lambda world, message: reply_to(message, world.issue(ECHO), re=b"\1" * 32),
    "another addressee": lambda world, message: reply_to(message, world.issue(ECHO), aud=OTHER),
    "another capability": lambda world, message: reply_to(message, world.issue(ECHO), cap="say"),
    "another subject": lambda world, message: reply_to(message, world.issue(ECHO), sub=message.subject),
    "a minute ago": lambda world, message: reply_to(message, world.issue(ECHO), iat=clock_ms() - 60_000),
    "in a minute": lambda world, message: reply_to(
        message, world.issue(ECHO), iat=clock_ms() + 60_000, exp=clock_ms() + 90_000
    ),
    "another kind": lambda world, message: reply_to(message, world.issue(ECHO), kind=Kind.PROGRESS, seq=0),
    "another's refusal": lambda world, message: reply_to(
        message, world.issue(OTHER), {"step": "authorization", "reason": "no"}, kind=Kind.REFUSAL
    ),
}


@pytest.mark.parametrize("forged", list(FORGERIES))
async def test_an_answer_that_is_not_the_callees_to_this_request_is_dropped(
    world, mallory, asked, cli, forged
):
    _, message = asked
    await mallory.send(message.reply, FORGERIES[forged](world, message).frame)
    await until(lambda: cli.dropped("forged") == 1, "the drop")
    await honest(world, mallory, asked)
    assert cli.dropped("forged") == 1


async def test_bytes_that_are_no_answer_are_dropped(world, mallory, asked, cli):
    _, message = asked
    genuine = reply_to(message, world.issue(ECHO)).frame
    name = sign_head(b"\x80", world.issue(ECHO), b"")
    wrong = [b"", b"{}", genuine[:-1], genuine + b"\0", genuine[:200] + b"\xff" + genuine[201:], name.frame]
    for data in wrong:
        await mallory.send(message.reply, data)
    await until(lambda: cli.dropped("forged") == len(wrong), "the drops")
    await honest(world, mallory, asked)


async def test_what_comes_after_the_answer_is_dropped(world, mallory, asked, cli):
    task, message = asked
    first, second = (reply_to(message, world.issue(ECHO), result_of({"n": n})) for n in (1, 2))
    await mallory.client.publish(message.reply, first.frame)
    await mallory.client.publish(message.reply, second.frame)
    await mallory.flush()
    assert data_of(await task) == {"n": 1}
    await until(lambda: cli.dropped("late") + cli.dropped("duplicate") == 1, "the second's drop")
    await mallory.send(message.reply, first.frame)
    await until(lambda: cli.dropped("late") + cli.dropped("duplicate") == 2, "the third's drop")
    assert cli.dropped("late") >= 1
    assert cli.dropped("forged") == 0


async def test_a_true_refusal_ends_the_wait(world, mallory, asked):
    task, message = asked
    body = {"step": "authorization", "reason": "no", "audit_id": "a-1"}
    await mallory.send(message.reply, reply_to(message, world.issue(ECHO), body, kind=Kind.REFUSAL).frame)
    with pytest.raises(AuthorizationError) as denial:
        await task
    assert (denial.value.reason, denial.value.audit_id) == ("no", "a-1")


async def test_retry_after_makes_a_new_call_with_a_new_id(world, mallory, cli):
    heard = await mallory.listen(call_subject(ECHO, "work"))
    task = asyncio.create_task(cli.call(str(ECHO), "work", {"text": "x"}, timeout=PATIENCE))
    first = await heard_within(heard)
    body = {"step": "replay", "reason": "not ready", "audit_id": "a-1", "retry_after": 0.05}
    await mallory.send(first.reply, reply_to(first, world.issue(ECHO), body, kind=Kind.REFUSAL).frame)
    second = await heard_within(heard)
    assert request_of(first)[0].id != request_of(second)[0].id
    await honest(world, mallory, (task, second))


async def test_a_false_503_can_not_take_an_answer_away(world, mallory, cli):
    """The broker says that nobody is there; the callee is, and its answer to the first attempt counts."""
    heard = await mallory.listen(call_subject(ECHO, "work"))
    task = asyncio.create_task(cli.call(str(ECHO), "work", {"text": "x"}, timeout=PATIENCE))
    first = await heard_within(heard)
    await mallory.send(first.reply, b"", headers={"Status": "503"})
    second = await heard_within(heard, "second attempt")
    one, other = request_of(first)[0], request_of(second)[0]
    assert one.id == other.id
    assert request_of(first)[1] != request_of(second)[1]
    answer = reply_to(first, world.issue(ECHO), result_of({"answer": "to the first"}))
    await mallory.send(first.reply, answer.frame)
    assert data_of(await task) == {"answer": "to the first"}


async def test_nobody_there_then_a_refusal_is_the_refusal(world, mallory, cli):
    heard = await mallory.listen(call_subject(ECHO, "work"))
    task = asyncio.create_task(cli.call(str(ECHO), "work", {"text": "x"}, timeout=PATIENCE))
    first = await heard_within(heard)
    await mallory.send(first.reply, b"", headers={"Status": "503"})
    second = await heard_within(heard)
    body = {"step": "payload", "reason": "wrong", "audit_id": "a-1"}
    await mallory.send(second.reply, reply_to(second, world.issue(ECHO), body, kind=Kind.REFUSAL).frame)
    with pytest.raises(CallRefusedError, match="wrong"):
        await task


async def test_nobody_there_is_tried_again_with_the_same_id(world, cli):
    with pytest.raises(NoResponderError):
        await cli.call(str(ECHO), "work", {"text": "x"}, timeout=PATIENCE)
    sent = world.audit("cli", event="call")
    assert len(sent) > 3  # for bus.retry.patience, not for a number of times
    assert len({one["id"] for one in sent}) == 1


async def test_a_safe_call_without_an_answer_is_made_again_and_another_is_not(world, mallory, cli):
    heard = await mallory.listen("aw.call.>")
    safe = asyncio.create_task(cli.call(str(ECHO), "say", {"text": "x"}, timeout=2, safe=True))
    first, second = await heard_within(heard), await heard_within(heard)
    assert request_of(first)[0].id == request_of(second)[0].id
    answer = reply_to(second, world.issue(ECHO), result_of({"answer": "second"}))
    await mallory.send(second.reply, answer.frame)
    assert data_of(await safe) == {"answer": "second"}
    with pytest.raises(Exception, match="in time"):
        await cli.call(str(ECHO), "work", {"text": "x"}, timeout=0.3)
    assert len(world.audit("cli", event="call", cap="work")) == 1


async def test_an_answer_that_is_no_result_is_an_error_of_its_own(world, mallory, asked):
    from agentweave_bus.exceptions import AgentCallError

    task, message = asked
    await mallory.send(message.reply, reply_to(message, world.issue(ECHO), {"status": "nonsense"}).frame)
    with pytest.raises(AgentCallError, match="is no result"):
        await task
