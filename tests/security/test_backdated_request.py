"""Attack: a request of the past under a certificate of today, which was not issued yet at that time.

Whoever gets an SVID now, by theft or by being made an agent today, would else be believed for whatever it
dates before: that somebody had asked for the work long ago, when another rule stood or nobody looked. Its
signer has to have held the certificate at the time that a link names.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.envelope import Kind
from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, FRONT
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, link_of, reply_of

pytestmark = pytest.mark.anyio

MINUTE = 60_000
ISSUED_MINUTES_AGO = 10


async def send(attack, asked_minutes_ago):
    """Front acts on a task by the client, whose certificate is ten minutes old."""
    begun = datetime.now(UTC) - timedelta(minutes=ISSUED_MINUTES_AGO)
    svid = attack.world.issue(CLI, not_before=begun, lifetime=timedelta(hours=1))
    now = clock_ms()
    dated = {"iat": now - asked_minutes_ago * MINUTE, "exp": now + 30 * MINUTE}
    link = link_of(svid, CLI, FRONT, kind=Kind.TASK, **dated)
    forged = forged_call(attack.world.issue(FRONT), iss=FRONT, via=(link,))
    inbox = await attack.mallory.listen(reply_of(forged, FRONT))
    await attack.send(forged.frame, reply=reply_of(forged, FRONT))
    return inbox


async def test_since_its_signers_certificate_began(attack):
    """Honest; only the time before sets the attack below apart."""
    await heard_within(await send(attack, ISSUED_MINUTES_AGO - 1))
    await attack.admitted()


@refused_by(
    Step.DELEGATION,
    "a request dated before its signer's certificate began, which is good by now",
    by=Adversary.THIEF,
)
async def test_before_its_signers_certificate_began(attack):
    await send(attack, ISSUED_MINUTES_AGO + 1)
    await attack.refused(reason="rule 5")
