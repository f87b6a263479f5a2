"""Attack: yesterday's call, tomorrow's call, a call that has expired, a certificate that has."""

from __future__ import annotations

import time
from datetime import timedelta

import anyio
import pytest

from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.probes import CLI
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

TIMES = {
    "expired": ({"iat": -5_000, "exp": -1}, "expired"),
    "future": ({"iat": 10_000, "exp": 20_000}, "in the future"),
    "old": ({"iat": -31_000, "exp": 20_000}, "ago"),
    "backdated a day": ({"iat": -86_400_000, "exp": -86_399_000}, ""),
}


@pytest.mark.parametrize("name", list(TIMES))
async def test_a_call_of_another_time(attack, name):
    changes, reason = TIMES[name]
    now = clock_ms()
    forged = forged_call(attack.world.issue(CLI), **{key: now + value for key, value in changes.items()})
    await attack.send(forged.frame, reply=reply_of(forged))
    record = await attack.refused("time", reason=reason)
    assert record["step"] == 8


async def test_an_expired_certificate(attack):
    svid = attack.world.issue(CLI, lifetime=timedelta(seconds=1))
    await anyio.sleep(max(0.0, svid.expiry.timestamp() - time.time()) + 0.1)
    forged = forged_call(svid)
    await attack.send(forged.frame, reply=reply_of(forged))
    await attack.refused("chain")
