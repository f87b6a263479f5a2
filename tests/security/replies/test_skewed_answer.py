"""Attack: answers of another time. What makes one fresh is the request that it names; its time is bounded, too."""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.callee import reply_to, result_of
from tests.integration.probes import ECHO, PATIENCE, data_of
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio


@refused_by(Layer.CALLER, "an answer dated more than 30 s away", by=Adversary.BROKER)
@pytest.mark.parametrize("away_ms", [-31_000, 32_000])
async def test_beyond_the_bound(question, away_ms):
    iat = clock_ms() + away_ms
    answer = reply_to(question.message, question.world.issue(ECHO), iat=iat, exp=iat + 30_000)
    await question.answer(answer.frame)
    await question.all_dropped()


@pytest.mark.parametrize("away_ms", [-25_000, 25_000])
async def test_within_the_bound_clocks_may_differ(question, away_ms):
    """Honest, with a clock that is off."""
    iat = clock_ms() + away_ms
    body = result_of({"answer": "of a callee whose clock is off"})
    answer = reply_to(question.message, question.world.issue(ECHO), body, iat=iat, exp=iat + 30_000)
    await question.answer(answer.frame)
    async with asyncio.timeout(PATIENCE):
        assert data_of(await question.task) == {"answer": "of a callee whose clock is off"}
