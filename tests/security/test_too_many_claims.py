"""Attack: claims without end, so that none is left for the others who call the same agent."""

from __future__ import annotations

import pytest

from agentweave_bus.bus import claim_rates
from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.streams import claim_stream_name
from tests.integration.probes import CLI, ECHO, FRONT
from tests.security.catalogue import Adversary, refused_by
from tests.security.conftest import counted
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio


@refused_by(Step.REPLAY, "claiming faster than one sender may", by=Adversary.CALLER)
async def test_more_claims_than_one_sender_may_make(world, echo, mallory, monkeypatch):
    """With an allowance of one a second the first of three calls runs, and another sender's after them."""
    monkeypatch.setattr(claim_rates, "_CLAIMS_PER_SECOND", 1.0)
    before = await world.stored(mallory, claim_stream_name(ECHO))
    svid = world.issue(CLI)
    calls = [forged_call(svid) for _ in range(3)]
    for call in calls:  # at once: nothing comes back to the allowance meanwhile
        await mallory.client.publish(call.head.sub, call.frame, reply_of(call))
    await world.refusal("echo", after=1)
    refusals = world.refusals("echo")
    assert {one["reason"] for one in refusals} == {"claims of this sender come too fast"}
    assert {(one["step"], one["step_name"]) for one in refusals} == {(Step.REPLAY.number, Step.REPLAY.label)}
    assert {one["iss"] for one in refusals} == {str(CLI)}
    assert {one["id"] for one in refusals} < {call.head.id for call in calls}
    assert counted(echo, Step.REPLAY) == 2
    front = await world.client(FRONT)
    assert await front.ask(ECHO, "work", {"text": "mine"}) == {"worked": "mine"}
    assert echo.ran == ["work", "work"]
    assert await world.stored(mallory, claim_stream_name(ECHO)) == before + 2
