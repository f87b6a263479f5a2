"""Replay: nothing runs twice, whoever sends it again, and nobody's id can be taken from him."""

from __future__ import annotations

import asyncio
import json

import pytest

from agentweave_bus.bus.streams import claim_stream, claim_stream_name
from agentweave_bus.bus.subjects import call_subject, reply_subject
from agentweave_bus.envelope import JSON_CONTENT_TYPE, Draft, Kind, Sealer, encode_payload, new_id
from agentweave_bus.exceptions import CallRefusedError
from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.connections import heard_within, until
from tests.integration.probes import CLI, ECHO, OTHER
from tests.integration.processes import worker_process
from tests.integration.world import metric

pytestmark = pytest.mark.anyio


async def captured_call(cli, mallory, name="work", payload=None):
    """An honest call that has been answered, as it went over the wire."""
    heard = await mallory.listen(call_subject(ECHO, name))
    await cli.ask(ECHO, name, payload or {"text": "once"})
    return await heard_within(heard)


async def test_the_same_process_refuses_it_and_does_not_answer(world, echo, cli, mallory):
    frame = await captured_call(cli, mallory)
    inbox = await mallory.listen(frame.reply)
    await mallory.send(frame.subject, frame.data, frame.reply)
    refusal = await world.refusal("echo", step_name="replay")
    assert (refusal["step"], refusal["reason"]) == (9, "this envelope was admitted before")
    assert refusal["digest"] == world.audit("echo", event="admission")[0]["digest"]
    assert echo.ran == ["work"]
    # A later call is answered, so an answer to the replay would be here by now.
    await cli.ask(ECHO, "say", {"text": "x"})
    assert inbox.empty()
    assert _refused(echo, "replay") == 1


def _refused(agent, step):
    return metric(agent.parts, "agentweave_admission_refusals_total", step=step, reason="refused")


async def test_a_second_replica_refuses_it(world, echo, cli, mallory):
    frame = await captured_call(cli, mallory)
    await world.running(echo).stop()
    replica = await world.agent(ECHO)
    await mallory.send(frame.subject, frame.data, frame.reply)
    refusal = await world.refusal("echo", step_name="replay")
    assert refusal["reason"] == "this id is claimed already"
    assert replica.ran == []


async def test_two_replicas_at_the_same_time_run_it_once(world, cli, mallory):
    replicas = [await world.agent(ECHO) for _ in range(2)]
    heard = await mallory.listen(call_subject(ECHO, "work"))
    await cli.ask(ECHO, "work", {"text": "once"})
    frame = await heard_within(heard)
    for _ in range(20):  # the queue group deals them out at random
        await mallory.send(frame.subject, frame.data, frame.reply)
    await until(lambda: len(world.refusals("echo", step_name="replay")) == 20, "20 refusals")
    assert sum(len(one.ran) for one in replicas) == 1
    reasons = {one["reason"] for one in world.refusals("echo")}
    assert reasons == {"this id is claimed already", "this envelope was admitted before"}


async def test_a_restarted_worker_process_refuses_it(world, cli, mallory):
    async with worker_process(world, ECHO) as worker:
        frame = await captured_call(cli, mallory)
        worker.process.terminate()
        assert await worker.wait() == 0
    async with worker_process(world, ECHO):
        await mallory.send(frame.subject, frame.data, frame.reply)
        refusal = await world.refusal("echo", step_name="replay")
        assert refusal["reason"] == "this id is claimed already"
        assert len(world.audit("echo", event="admission")) == 1


async def test_a_safe_capability_leaves_no_claim_and_others_leave_one_each(world, echo, cli, mallory):
    stream = claim_stream_name(ECHO)
    before = await world.stored(mallory, stream)
    for _ in range(3):
        await cli.ask(ECHO, "say", {"text": "x"})
    assert await world.stored(mallory, stream) == before
    for _ in range(3):
        await cli.ask(ECHO, "work", {"text": "x"})
    assert await world.stored(mallory, stream) == before + 3


async def test_a_retry_of_an_id_that_has_run_is_not_run_again(world, echo, cli, mallory):
    """Another head with the same id: sealed again by the caller itself, so every signature is right."""
    frame = await captured_call(cli, mallory)
    call_id = frame.reply.rpartition(".")[2]
    now = clock_ms()
    instance = frame.reply.split(".")[4]
    again = sealed_call(world.issue(CLI), "work", call_id=call_id, instance=instance, iat=now)
    await mallory.send(frame.subject, again.frame, again_reply(again))
    refusal = await world.refusal("echo", step_name="replay")
    assert refusal["reason"] == "this id is claimed already"
    assert echo.ran == ["work"]


def sealed_call(svid, name, *, call_id=None, instance="A" * 22, iat=None, payload=None, **changes):
    iat = clock_ms() if iat is None else iat
    values = {
        "kind": Kind.CALL,
        "id": call_id or new_id(iat),
        "aud": ECHO,
        "cap": name,
        "sub": call_subject(ECHO, name),
        "iat": iat,
        "exp": iat + 30_000,
        "reply": instance,
        "ct": JSON_CONTENT_TYPE,
    } | changes
    return Sealer(lambda: svid).seal_now(Draft(**values), encode_payload(payload or {"text": "x"}))


def again_reply(sealed):
    return reply_subject(sealed.head.iss, sealed.head.reply, sealed.head.id)


async def test_a_stranger_can_not_burn_somebodys_id(world, echo, cli, mallory):
    """Whoever guesses an id that is yet to be used claims, at most, his own."""
    call_id = new_id(clock_ms())
    before = await world.stored(mallory, claim_stream_name(ECHO))
    stranger = sealed_call(world.issue(OTHER), "work", call_id=call_id)
    await mallory.send(stranger.head.sub, stranger.frame, again_reply(stranger))
    refusal = await world.refusal("echo", step_name="authorization")
    assert refusal["caller"] == str(OTHER)
    # Without a grant he does not even get to claim.
    assert await world.stored(mallory, claim_stream_name(ECHO)) == before
    honest = sealed_call(world.issue(CLI), "work", call_id=call_id)
    inbox = await mallory.listen(again_reply(honest))
    await mallory.send(honest.head.sub, honest.frame, again_reply(honest))
    await heard_within(inbox, "answer")
    assert echo.ran == ["work"]


async def test_a_denied_call_leaves_no_claim(world, echo, mallory):
    before = await world.stored(mallory, claim_stream_name(ECHO))
    for _ in range(3):
        sealed = sealed_call(world.issue(OTHER), "work")
        await mallory.send(sealed.head.sub, sealed.frame, again_reply(sealed))
    await until(lambda: len(world.refusals("echo")) == 3, "3 refusals")
    assert await world.stored(mallory, claim_stream_name(ECHO)) == before


async def test_without_jetstream_nothing_runs_that_needs_a_claim(world, echo, cli, mallory):
    """The stream is gone: the caller is told to try again later, and a safe call is not concerned."""
    heard = await mallory.listen("probe.deleted")
    spec = claim_stream_name(ECHO)
    kept = await world.stored(mallory, spec)
    await mallory.send(f"$JS.API.STREAM.DELETE.{spec}", b"", "probe.deleted")
    await heard_within(heard)
    try:
        with pytest.raises(CallRefusedError) as refusal:
            await cli.call(str(ECHO), "work", {"text": "x"}, timeout=2)
        assert refusal.value.retry_after is not None
        assert echo.ran == []
        assert await cli.ask(ECHO, "say", {"text": "x"}) == {"said": "x"}
    finally:
        await mallory.send(
            f"$JS.API.STREAM.CREATE.{spec}", json.dumps(claim_stream(ECHO).config).encode(), "probe.deleted"
        )
        assert "error" not in json.loads((await heard_within(heard)).data)
    assert kept >= 0
    # A call older than the new stream, plus 2 s, might have been claimed in the old one.
    await world.running(echo).stop()
    echo = await world.agent(ECHO)
    early = asyncio.create_task(cli.ask(ECHO, "work", {"text": "patient"}))
    assert await early == {"worked": "patient"}
    assert world.refusals("echo", reason="the claim stream is newer than the call")
