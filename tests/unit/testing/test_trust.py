"""Throwaway identities: real certificates, by the clock that they are given."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from agentweave_bus.exceptions import BundleUnavailableError, ChainRefusedError, IdentityError
from agentweave_bus.identity import IdentitySource, X509Svid
from agentweave_bus.identity.chain import verify_chain
from agentweave_bus.testing import MockIdentityProvider, TrustDomain, VirtualClock

pytestmark = pytest.mark.anyio


def verify(svid: X509Svid, domain: TrustDomain) -> None:
    verify_chain(svid.cert_chain, domain.bundle, at_ms=domain.clock.time_ns() // 1_000_000)


async def test_a_provider_by_itself() -> None:
    provider = MockIdentityProvider("spiffe://acme.test/agent/order")
    svid = await provider.get_svid()
    assert svid.spiffe_id == provider.get_spiffe_id() == "spiffe://acme.test/agent/order"
    assert provider.trust_domain.bundle == await provider.get_trust_bundle("acme.test")
    verify(svid, provider.trust_domain)
    with pytest.raises(BundleUnavailableError):
        await provider.get_trust_bundle("other.test")


async def test_domains_trust_whom_they_name_and_no_twin() -> None:
    ours, theirs, twin = TrustDomain("a.test"), TrustDomain("b.test"), TrustDomain("a.test")
    provider = MockIdentityProvider("spiffe://a.test/x", trust_domain=ours, federated=[theirs])
    assert await provider.get_trust_bundle("b.test") == theirs.bundle
    verify(ours.issue("x"), ours)
    with pytest.raises(ChainRefusedError):
        verify(twin.issue("x"), ours)
    with pytest.raises(IdentityError):
        ours.issue("spiffe://b.test/x")


async def test_it_is_renewed_at_half_of_its_life_by_the_clock() -> None:
    clock = VirtualClock()
    domain = TrustDomain(clock=clock)
    provider = domain.provider("agent/x", lifetime=timedelta(hours=4))
    source = IdentitySource(provider, clock=lambda: clock.time_ns() / 1e9)
    await source.start()
    running = asyncio.create_task(source.run())
    first = source.svid
    await clock.advance(timedelta(hours=1, minutes=55))
    assert source.svid == first
    await clock.advance(timedelta(minutes=10))
    assert source.svid != first
    verify(source.svid, domain)
    running.cancel()


async def test_the_steps_of_a_rotation() -> None:
    domain = TrustDomain()
    provider = domain.provider("agent/x")
    old = await provider.get_svid()
    domain.add_authority()
    verify(old, domain)
    domain.renew_all()
    new = await provider.get_svid()
    verify(old, domain)
    verify(new, domain)
    domain.retire_old_authorities()
    verify(new, domain)
    with pytest.raises(ChainRefusedError):
        verify(old, domain)


async def test_a_change_between_two_looks_is_not_missed() -> None:
    domain = TrustDomain()
    provider = domain.provider("agent/x")
    domain.rotate_ca()
    async with asyncio.timeout(30):
        await provider.wait_for_update()
