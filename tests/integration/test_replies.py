"""What a caller does with true answers, refusals and the lack of them. Forged ones: tests/security/replies.

The callee is played by the test, which holds the callee's own SVID for the honest answers.
"""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.envelope import Kind
from agentweave_bus.exceptions import AuthorizationError, CallRefusedError, NoResponderError
from tests.integration.callee import reply_to, request_of, result_of
from tests.integration.connections import heard_within
from tests.integration.probes import ECHO, PATIENCE, data_of
from tests.integration.world import metric

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
    assert metric(cli.parts, "agentweave_call_retries_total") == 1
    with pytest.raises(Exception, match="in time"):
        await cli.call(str(ECHO), "work", {"text": "x"}, timeout=0.3)
    assert len(world.audit("cli", event="call", cap="work")) == 1


async def test_an_answer_that_is_no_result_is_an_error_of_its_own(world, mallory, asked):
    from agentweave_bus.exceptions import AgentCallError

    task, message = asked
    await mallory.send(message.reply, reply_to(message, world.issue(ECHO), {"status": "nonsense"}).frame)
    with pytest.raises(AgentCallError, match="is no result"):
        await task
