"""Claims: which calls leave one, and what is done without them. Replays: tests/security/test_replay_*.py."""

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
from tests.integration.probes import ECHO, OTHER

pytestmark = pytest.mark.anyio


async def test_a_safe_capability_leaves_no_claim_and_others_leave_one_each(world, echo, cli, mallory):
    stream = claim_stream_name(ECHO)
    before = await world.stored(mallory, stream)
    for _ in range(3):
        await cli.ask(ECHO, "say", {"text": "x"})
    assert await world.stored(mallory, stream) == before
    for _ in range(3):
        await cli.ask(ECHO, "work", {"text": "x"})
    assert await world.stored(mallory, stream) == before + 3


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
