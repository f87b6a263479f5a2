"""Attack: the broker lies about the age of the claims, from which it follows which calls may have run."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from agentweave_bus.bus import claims
from agentweave_bus.bus.admission import Step
from tests.faults.stage import rotated
from tests.integration.callee import replaced
from tests.integration.connections import until
from tests.integration.probes import CLI, ECHO
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

NO_AGE = {
    "an error": {"error": {"code": 404, "err_code": 10059}},
    "nothing": b"",
    "no JSON": b"+OK",
    "a list": b"[]",
    "a number": b"7",
    "very deep": b"[" * 100_000,
    "no text": {"created": 7},
    "no time": {"created": "yesterday"},
    "no such day": {"created": "2024-13-45T99:99:99.5Z"},
    "no age": {"config": {}},
}


async def refused(deceived, number, reason):
    """Send a call that is honest, and see it refused: it is the ``number``-th refusal."""
    call = forged_call(deceived.liar.world.issue(CLI))
    await deceived.liar.raw.send(call.head.sub, call.frame, reply_of(call))
    await until(lambda: len(deceived.refusals()) == number, "the refusal")
    record = deceived.refusals()[-1]
    assert (record["step"], record["step_name"]) == (Step.REPLAY.number, Step.REPLAY.label)
    assert record["reason"] == reason


async def told_anew(deceived, age):
    """Have the callee ask for the age again: a sequence number that does not grow makes it doubt."""
    deceived.liar.acknowledge = lambda _: {"stream": "s", "seq": 1}
    deceived.liar.created = lambda: age
    await refused(deceived, 1, "the call could not be claimed")


async def honest_again(deceived):
    """With the truth calls run again, in the same process."""
    deceived.liar.be_honest()
    await deceived.cli.ask(ECHO, "work", {"text": "after"})
    assert deceived.echo.ran == ["work"]


@refused_by(Step.REPLAY, "claims of no known age", by=Adversary.BROKER)
@pytest.mark.parametrize("said", list(NO_AGE))
async def test_an_age_that_is_none(deceived, said):
    await told_anew(deceived, NO_AGE[said])
    await refused(deceived, 2, "the claim stream does not answer")
    assert deceived.echo.ran == []
    await honest_again(deceived)


@refused_by(Step.REPLAY, "claims said to be younger than every call", by=Adversary.BROKER)
async def test_an_age_in_the_future(deceived):
    """It can keep calls from running, as by dropping them."""
    await told_anew(deceived, {"created": (datetime.now(UTC) + timedelta(days=1)).isoformat()})
    await refused(deceived, 2, "the claim stream is newer than the call")
    assert deceived.echo.ran == []
    await honest_again(deceived)


@refused_by(Step.REPLAY, "claims whose age is never told to a new connection", by=Adversary.BROKER)
async def test_silence_about_the_age(deceived):
    """Nothing is claimed then. But the agent connects, and what needs no claim is done."""
    liar, keeper = deceived.liar, deceived.echo.parts.keeper
    liar.created = lambda: None
    with replaced(keeper, "_address", replace(keeper._address, connect_timeout=2.0)):
        await rotated(deceived.echo.parts, liar.world, ECHO)
    assert await deceived.cli.ask(ECHO, "say", {"text": "safe"}) == {"said": "safe"}
    with replaced(claims, "_TIMEOUT_S", 0.1):
        await refused(deceived, 1, "the call could not be claimed")
    assert deceived.echo.ran == ["say"]
    deceived.echo.ran.clear()
    await honest_again(deceived)
