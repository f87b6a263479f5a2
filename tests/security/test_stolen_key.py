"""Attack: a key that was stolen, and whose certificate has expired since, signs a request of the past.

Work may go on for hours after the one who asked has got a new certificate, so a link's signer may have
expired by four hours. Within these a thief, together with the agent that was asked, can make up requests
that were never made; the policy is told that the signer has expired. After these it is over.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.envelope import DEFAULT_LIMITS, Kind
from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, FRONT
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, link_of, reply_of

pytestmark = pytest.mark.anyio

MINUTE = 60_000
GRACE = DEFAULT_LIMITS.default_link_grace_ms


def stolen(world, expired_ms_ago):
    """The client's SVID of an hour, ended so long ago."""
    end = datetime.now(UTC) - timedelta(milliseconds=expired_ms_ago)
    return world.issue(CLI, not_before=end - timedelta(hours=1), lifetime=timedelta(hours=1))


def asked_then(svid, before_end_ms):
    """A task for front that the thief says the client sent before its certificate ended."""
    iat = int(svid.expiry.timestamp() * 1000) - before_end_ms
    return link_of(svid, CLI, FRONT, kind=Kind.TASK, iat=iat, exp=clock_ms() + 60 * MINUTE)


async def send(attack, link):
    """Front, whose own certificate is good, acts on it."""
    forged = forged_call(attack.world.issue(FRONT), iss=FRONT, via=(link,))
    inbox = await attack.mallory.listen(reply_of(forged, FRONT))
    await attack.send(forged.frame, reply=reply_of(forged, FRONT))
    return inbox


async def test_within_the_grace_the_policy_is_told_that_the_signer_has_expired(attack):
    """Not protected: a link whose signer expired less than four hours ago counts; the policy is told that it has."""
    inbox = await send(attack, asked_then(stolen(attack.world, GRACE - MINUTE), MINUTE))
    await heard_within(inbox)
    record = await attack.admitted()
    (link,) = record["input"]["context"]["via"]
    assert (link["iss"], link["kind"], link["sender_expired"]) == (str(CLI), "task", True)


async def test_of_a_signer_that_has_not_expired_the_policy_is_told_that(attack):
    """Honest; what the attacks below backdate is what makes them fail."""
    link = link_of(attack.world.issue(CLI), CLI, FRONT, kind=Kind.TASK, exp=clock_ms() + 60 * MINUTE)
    await heard_within(await send(attack, link))
    record = await attack.admitted()
    assert record["input"]["context"]["via"][0]["sender_expired"] is False


@refused_by(
    Step.DELEGATION, "a backdated request by a key that expired longer ago than the grace", by=Adversary.THIEF
)
async def test_beyond_the_grace(attack):
    await send(attack, asked_then(stolen(attack.world, GRACE + MINUTE), MINUTE))
    await attack.refused(reason="rule 5")


@refused_by(
    Step.DELEGATION,
    "a request dated after or before the validity of the stolen certificate",
    by=Adversary.THIEF,
)
async def test_outside_of_its_validity(attack):
    """The grace is for work that was asked for in time, not for asking later."""
    svid = stolen(attack.world, 30 * MINUTE)
    for before_end_ms in (-MINUTE, 61 * MINUTE):
        await send(attack, asked_then(svid, before_end_ms))
    await attack.refused_all(2, reason="rule 5")


@refused_by(Step.CHAIN, "a backdated call of one's own by an expired key", by=Adversary.THIEF)
async def test_a_call_of_ones_own_has_no_grace(attack):
    svid = stolen(attack.world, MINUTE)
    iat = int(svid.expiry.timestamp() * 1000) - 1_000
    forged = forged_call(svid, iat=iat, exp=iat + 600_000)
    await attack.send(forged.frame, reply=reply_of(forged))
    await attack.refused(reason="the SVID expired")


@refused_by(Step.DELEGATION, "a call of the past as a link, by an expired key", by=Adversary.THIEF)
async def test_a_call_does_not_last_as_long_as_the_grace(attack):
    """A call ends within ten minutes, so nothing follows from it later, whoever signed it."""
    svid = stolen(attack.world, 30 * MINUTE)
    iat = int(svid.expiry.timestamp() * 1000) - MINUTE
    await send(attack, link_of(svid, CLI, FRONT, iat=iat, exp=iat + DEFAULT_LIMITS.max_call_lifetime_ms))
    await attack.refused(reason="rule 4")
