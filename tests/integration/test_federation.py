"""Other trust domains: only those that are listed, each by its own bundle, and by grants like everybody."""

from __future__ import annotations

from datetime import timedelta

import anyio
import pytest
import yaml

from agentweave_bus.bus.subjects import reply_inbox
from agentweave_bus.exceptions import FederationError
from agentweave_bus.identity import Authority
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.connections import heard_within
from tests.integration.probes import DOMAIN, ECHO, GRANTS, PATIENCE
from tests.integration.test_replay import again_reply, sealed_call
from tests.integration.world import metric

pytestmark = pytest.mark.anyio

PARTNER = SpiffeID("spiffe://partner.test/agent/buyer")


@pytest.fixture
async def partner(world, tmp_path):
    """The other domain's authority, federated, and grants of something to its buyer, here and at the broker."""
    authority = Authority("partner.test")
    world.stack.api.federate([authority.bundle])
    given = {"caller": str(PARTNER), "callee": str(ECHO), "capabilities": ["work"]}
    partners = {"partner.test": {"rate_limit_per_minute": 600}}
    grants = tmp_path / "grants.yaml"
    grants.write_text(yaml.safe_dump({"grants": [given], "partners": partners}))
    world.grant({"grants": [*GRANTS["grants"], given], "partners": partners})
    await may_answer(world, PARTNER)
    yield authority, str(grants)
    world.grant(GRANTS)
    world.stack.api.federate([])


async def may_answer(world, caller):
    """Wait until the broker has been told of the grants: then their callee may publish to the inbox."""
    with anyio.fail_after(PATIENCE):
        while True:
            raw = await world.raw(ECHO)
            await raw.send(f"{reply_inbox(caller, 'A' * 22)}.id", b"x")
            if not raw.refused:
                return
            await anyio.sleep(0.1)


def buyer(authority, identity=PARTNER):
    return authority.issue(identity, lifetime=timedelta(hours=1))


async def send(mallory, svid, name="work"):
    sealed = sealed_call(svid, name)
    inbox = await mallory.listen(again_reply(sealed))
    await mallory.send(sealed.head.sub, sealed.frame, again_reply(sealed))
    return sealed, inbox


async def test_a_listed_domain_with_a_bundle_and_a_grant_is_served(world, mallory, partner):
    authority, grants = partner
    echo = await world.agent(
        ECHO, identity__allowed_trust_domains=[DOMAIN, "partner.test"], authorization__bundle=grants
    )
    _, inbox = await send(mallory, buyer(authority))
    await heard_within(inbox, "answer")
    assert echo.ran == ["work"]
    assert world.audit("echo", event="admission")[0]["caller"] == str(PARTNER)
    assert metric(echo.parts, "agentweave_federation_errors_total") == 0


async def test_a_domain_that_is_not_listed_is_refused_unanswered(world, mallory, partner):
    authority, grants = partner
    echo = await world.agent(ECHO, authorization__bundle=grants)
    _, inbox = await send(mallory, buyer(authority))
    refusal = await world.refusal("echo")
    assert (refusal["step"], refusal["step_name"]) == (3, "chain")
    assert "partner.test is not allowed here" in refusal["reason"]
    assert metric(echo.parts, "agentweave_federation_errors_total") == 1
    assert echo.ran == []
    assert inbox.empty()


async def test_one_domains_authority_can_not_make_another_domains_identity(world, mallory, partner):
    """Bundles are never pooled: partner.test's key signs a chain that names demo.test."""
    authority, grants = partner
    echo = await world.agent(
        ECHO, identity__allowed_trust_domains=[DOMAIN, "partner.test"], authorization__bundle=grants
    )
    rogue = Authority(DOMAIN)
    _, _ = await send(mallory, buyer(rogue, SpiffeID(f"spiffe://{DOMAIN}/client/cli")))
    refusal = await world.refusal("echo", step_name="chain")
    assert refusal["step"] == 3
    stranger = Authority("partner.test")  # the right name, another key than the federated one
    await send(mallory, buyer(stranger))
    await world.refusal("echo", after=1, step_name="chain")
    assert echo.ran == []
    await send(mallory, buyer(authority))
    await heard_within((await send(mallory, buyer(authority)))[1], "answer")
    assert set(echo.ran) == {"work"}


async def test_calling_a_listed_domain_without_a_bundle_says_what_is_missing(world, mallory):
    echo = await world.agent(ECHO, identity__allowed_trust_domains=[DOMAIN, "partner.test"])
    await send(mallory, buyer(Authority("partner.test")))
    refusal = await world.refusal("echo")
    assert "bundle is not known here" in refusal["reason"]
    assert echo.ran == []


async def test_calling_an_unlisted_domain_fails_here(world, cli):
    with pytest.raises(FederationError) as refusal:
        await cli.call(str(PARTNER), "work", {})
    assert refusal.value.trust_domain == "partner.test"
    assert metric(cli.parts, "agentweave_federation_errors_total") == 1
