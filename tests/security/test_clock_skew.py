"""Attack: times at the edge of what differing clocks are allowed, and lifetimes beyond what a call may have."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.probes import CLI, ECHO
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

TEN_MINUTES = 600_000
TOKEN = "A" * 22
# A machine that is busy may take so long between sealing here and looking at the clock there.
MARGIN = 1_500


async def sent(attack, *, iat, exp=20_000):
    """A call of ``say``, which is safe: the age of the claims has no say in it."""
    now = clock_ms()
    call = forged_call(
        attack.world.issue(CLI),
        cap="say",
        sub=call_subject(ECHO, "say"),
        raw={"iat": now + iat, "exp": now + exp, "reply": TOKEN},
    )
    reply = attack.message.reply if call.head is None else reply_of(call)
    await attack.send(call.frame, subject=call_subject(ECHO, "say"), reply=reply)


@pytest.mark.parametrize("iat", [1_900, -30_000 + MARGIN])
async def test_within_the_skew(attack, iat):
    """Honest; what the attacks below change is what makes them fail."""
    await sent(attack, iat=iat)
    await attack.admitted(ran="say")


@refused_by(Step.TIME, "a call dated just beyond what clocks may differ", by=Adversary.CALLER)
async def test_just_in_the_future(attack):
    await sent(attack, iat=2_000 + MARGIN)
    await attack.refused(reason="in the future")


@refused_by(Step.TIME, "a call that is just too old, whose deadline is far", by=Adversary.BROKER)
async def test_just_too_old(attack):
    """The deadline is the caller's wish. How long a captured call is of use is not for it to say."""
    await sent(attack, iat=-30_001, exp=TEN_MINUTES - 30_001)
    await attack.refused(reason="more than 30000")


@refused_by(Step.TIME, "a call in the moment of its deadline", by=Adversary.BROKER)
async def test_at_its_deadline(attack):
    await sent(attack, iat=-1_000, exp=0)
    await attack.refused(reason="expired")


@refused_by(Step.HEAD, "a call that wants to live longer than ten minutes", by=Adversary.CALLER)
async def test_too_long_a_life(attack):
    await sent(attack, iat=0, exp=TEN_MINUTES + 1)
    await attack.refused()


async def test_the_longest_life(attack):
    """Honest: ten minutes to the millisecond."""
    await sent(attack, iat=0, exp=TEN_MINUTES)
    await attack.admitted(ran="say")


@refused_by(Step.HEAD, "a call with times that are none", by=Adversary.CALLER)
@pytest.mark.parametrize(
    "raw",
    [
        {"iat": 0, "exp": 0},
        {"iat": 5, "exp": 4},
        {"iat": -1},
        {"iat": -1, "exp": 5},
        {"iat": 2**53},
        {"iat": 2**53, "exp": 2**53 + 5},
        {"exp": 2**53},
        {"iat": float(2**40)},
        {"iat": True},
        {"iat": "1"},
        {"nbf": 1},
    ],
    ids=str,
)
async def test_times_that_are_none(attack, raw):
    now = clock_ms()
    call = forged_call(attack.world.issue(CLI), raw={"iat": now, "exp": now + 1_000} | raw)
    await attack.send(call.frame, reply=attack.message.reply)
    await attack.refused()
