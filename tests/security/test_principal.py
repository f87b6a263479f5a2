"""Attack: a principal in whose name nobody asked, or whom the one who names it may not name."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, FRONT
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, link_of, reply_of, with_part

pytestmark = pytest.mark.anyio

ALICE = {"iss": "https://login.example", "sub": "alice"}
EVE = {"iss": "https://evil.example", "sub": "alice"}
HERE = (f"{ECHO}#work",)
THERE = (f"{FRONT}#relay", f"{ECHO}#work")


async def send(attack, forged, iss=CLI):
    inbox = await attack.mallory.listen(reply_of(forged, iss))
    await attack.send(forged.frame, reply=reply_of(forged, iss))
    return inbox


async def relayed(attack, *, origin, scope=THERE, **changes):
    """The client asks front and names ``origin``; front asks echo, and ``changes`` what it says."""
    exp = clock_ms() + 20_000
    link = link_of(attack.world.issue(CLI), CLI, FRONT, scope=scope, prn=origin, exp=exp)
    forged = forged_call(
        attack.world.issue(FRONT), iss=FRONT, via=(link,), **{"scope": HERE, "exp": exp, **changes}
    )
    return await send(attack, forged, FRONT)


async def test_one_that_may_be_named_is_told_to_the_policy(attack):
    """Honest; who names whom is what the attacks below change."""
    forged = forged_call(attack.world.issue(CLI), prn=ALICE, scope=HERE)
    await heard_within(await send(attack, forged))
    assert (await attack.admitted())["input"]["context"]["principal"] == ALICE


async def test_one_that_the_origin_named_is_handed_down(attack):
    """Honest, one call further."""
    await heard_within(await relayed(attack, origin=ALICE))
    assert (await attack.admitted())["input"]["context"]["principal"] == ALICE


@refused_by(Step.DELEGATION, "a principal named in the middle of a delegation", by=Adversary.AGENT)
async def test_named_in_the_middle(attack):
    """Whether or not the origin named one, and also the same one."""
    for origin in (None, ALICE, EVE):
        await relayed(attack, origin=origin, prn=ALICE)
    await attack.refused_all(3, reason="rule 2: only the origin of a chain names a principal")


@refused_by(
    Step.DELEGATION, "a principal without a scope that limits what is done in its name", by=Adversary.CALLER
)
async def test_named_without_a_scope(attack):
    await send(attack, forged_call(attack.world.issue(CLI), prn=ALICE))
    await attack.refused(reason="rule 6: a head that names a principal limits its scope")


@refused_by(Step.AUTHORIZATION, "a principal of an issuer that the origin may not name", by=Adversary.CALLER)
async def test_of_an_issuer_that_is_not_granted(attack):
    await send(attack, forged_call(attack.world.issue(CLI), prn=EVE, scope=HERE))
    record = await attack.refused(reason='does not list "https://evil.example"')
    assert record["input"]["context"]["principal"] == EVE


@refused_by(
    Step.AUTHORIZATION, "such a principal, handed down by an agent that was asked", by=Adversary.CALLER
)
async def test_of_an_issuer_that_is_not_granted_handed_down(attack):
    await relayed(attack, origin=EVE)
    await attack.refused(reason="lists no issuer for the principal")


@refused_by(Step.AUTHORIZATION, "a principal named by an origin that may name none", by=Adversary.AGENT)
async def test_by_an_origin_that_may_name_none(attack):
    """Front may ask echo for work, for itself; and may not, in alice's name."""
    forged = forged_call(attack.world.issue(FRONT), iss=FRONT, prn=ALICE, scope=HERE)
    await send(attack, forged, FRONT)
    await attack.refused(reason="lists no issuer for the principal")


@refused_by(Step.DELEGATION, "the principal of a link exchanged", by=Adversary.AGENT)
async def test_exchanged_in_a_link(attack):
    exp = clock_ms() + 20_000
    svid = attack.world.issue(CLI)
    one, two = (
        link_of(svid, CLI, FRONT, scope=THERE, prn=prn, exp=exp) for prn in (ALICE, {**ALICE, "sub": "bob"})
    )
    forged = forged_call(attack.world.issue(FRONT), iss=FRONT, via=(one,), scope=HERE, exp=exp)
    frame = with_part(forged.frame, "via", lambda _: [two.to_wire()])
    await attack.send(frame, reply=reply_of(forged, FRONT))
    await attack.refused(reason="rule 2")


@refused_by(Step.HEAD, "a principal that is no flat map of short texts", by=Adversary.CALLER)
async def test_that_is_none(attack):
    wrong = [{}, {"sub": "alice"}, {"iss": "x"}, {**ALICE, "roles": ["admin"]}, {**ALICE, "admin": True},
             {**ALICE, "Sub": "root"}, {**ALICE, "sub": ""}, {**ALICE, "sub": "a\nb"}, "alice", ["alice"]]  # fmt: skip
    svid = attack.world.issue(CLI)
    for principal in wrong:
        await attack.send(forged_call(svid, scope=HERE, raw={"prn": principal}).frame)
    await attack.refused_all(len(wrong), reason="the head's 'prn")
