"""Attack: yesterday's call, tomorrow's call, a call that has expired, a certificate that has."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.probes import CLI
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

DAY = 86_400_000


def timed(what, changes, reason):
    mark = refused_by(Step.TIME, f"a call {what}", by=Adversary.CALLER)
    return pytest.param(changes, reason, id=what, marks=mark)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        timed("that has expired", {"iat": -5_000, "exp": -1}, "expired"),
        timed("of the future", {"iat": 10_000, "exp": 20_000}, "in the future"),
        timed("older than half a minute", {"iat": -31_000, "exp": 20_000}, "ago"),
        timed("backdated by a day", {"iat": -DAY, "exp": 1_000 - DAY}, "issued 864"),
    ],
)
async def test_a_call_of_another_time(attack, changes, reason):
    now = clock_ms()
    forged = forged_call(attack.world.issue(CLI), **{key: now + value for key, value in changes.items()})
    await attack.send(forged.frame, reply=reply_of(forged))
    await attack.refused(reason=reason)


@refused_by(Step.CHAIN, "a call with an expired certificate", by=Adversary.THIEF)
async def test_an_expired_certificate(attack):
    a_minute_ago = datetime.now(UTC) - timedelta(minutes=1)
    svid = attack.world.issue(CLI, not_before=a_minute_ago - timedelta(hours=1), lifetime=timedelta(hours=1))
    forged = forged_call(svid)
    await attack.send(forged.frame, reply=reply_of(forged))
    await attack.refused(reason="the SVID expired")
