"""Attack: somebody who is not the policy server answers in its place, over TLS."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.exceptions import AuthorizationError
from agentweave_bus.identity import Authority
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.opa_player import OpaPlayer
from tests.integration.probes import CLI, DOMAIN, ECHO, MALLORY, PATIENCE
from tests.security.catalogue import Adversary, refused_by

pytestmark = pytest.mark.anyio

OPA = SpiffeID(f"spiffe://{DOMAIN}/opa")
HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
async def player(session_world):
    server = OpaPlayer(Path("/nowhere"))
    await server.start(svid=session_world.issue(OPA))
    yield server
    await server.stop()


@pytest.fixture(scope="module")
async def cast(session_world, player):
    world = session_world
    settings = {
        "authorization__provider": "opa",
        "authorization__opa_endpoint": player.url,
        "authorization__opa_spiffe_id": str(OPA),
        "authorization__timeout_ms": 1500,
        "authorization__circuit_breaker": {"failure_threshold": 10_000},
    }
    echo, cli, mallory = await world.agent(ECHO, **settings), await world.client(CLI), await world.raw()
    yield world, echo, cli, mallory, await mallory.listen(call_subject(ECHO, "work"))
    await world.clear()


def posing(what, made, reason, by=Adversary.POLICY):
    return pytest.param(made, reason, id=what, marks=refused_by(Step.AUTHORIZATION, what, by=by))


def expired(world):
    return world.issue(OPA, not_before=datetime.now(UTC) - 2 * HOUR, lifetime=HOUR)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        posing("another agent of the domain as policy server", lambda world: world.issue(MALLORY),
               f"the TLS peer is {MALLORY}, not {OPA}"),
        posing("the callee's own SVID as policy server", lambda world: world.issue(ECHO),
               f"the TLS peer is {ECHO}, not {OPA}"),
        posing("a policy server named below the right ID", lambda world: world.issue(SpiffeID(f"{OPA}/a")),
               f"the TLS peer is {OPA}/a, not {OPA}"),
        posing("a policy server of another authority for our domain", lambda _: Authority(DOMAIN).issue(OPA),
               "certificate verify failed", Adversary.DOMAIN),
        posing("a policy server of another domain",
               lambda _: Authority("else.test").issue(SpiffeID("spiffe://else.test/opa")),
               "certificate verify failed", Adversary.DOMAIN),
        posing("a policy server with an expired SVID", expired, "certificate has expired", Adversary.THIEF),
    ],
)  # fmt: skip
async def test_an_answer_from_somebody_else(attack, player, made, reason):
    await player.stop()
    await player.start(svid=made(attack.world))
    before = len(player.asked)
    try:
        with pytest.raises(AuthorizationError) as denial:
            await attack.cli.call(str(ECHO), "work", {"text": "x"}, timeout=PATIENCE)
        assert len(player.asked) == before  # it was not even told the question
    finally:
        await player.stop()
        await player.start(svid=attack.world.issue(OPA))
    record = await attack.refused(reason=reason)
    assert denial.value.audit_id == record["audit_id"]
    assert (denial.value.direction, denial.value.reason) == ("inbound", "the policy could not be asked")
