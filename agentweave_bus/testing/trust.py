"""Identities for tests: a trust domain that lives in memory, and providers that hand out its SVIDs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import timedelta
from typing import Final

import anyio

from agentweave_bus.exceptions import BundleUnavailableError
from agentweave_bus.identity import Authority, IdentityProvider, X509Bundle, X509Svid
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.testing.clock import Clock, RealClock

__all__ = ["DEFAULT_TRUST_DOMAIN", "MockIdentityProvider", "TrustDomain"]

DEFAULT_TRUST_DOMAIN: Final = "test.local"

_HOUR: Final = timedelta(hours=1)
_BACKDATE: Final = timedelta(seconds=10)


class TrustDomain:
    """A trust domain with a new authority: real certificates, worth nothing outside of the test.

    ``clock`` is what lifetimes are counted by, the machine's by default.
    """

    def __init__(self, name: str = DEFAULT_TRUST_DOMAIN, *, clock: Clock | None = None) -> None:
        self.authority = Authority(name)
        self.clock: Clock = clock if clock is not None else RealClock()
        self._providers: list[MockIdentityProvider] = []

    @property
    def name(self) -> str:
        """The trust domain."""
        return self.authority.trust_domain

    @property
    def bundle(self) -> X509Bundle:
        """The authorities that are trusted now."""
        return self.authority.bundle

    def id(self, path: str) -> SpiffeID:
        """Return the SPIFFE ID of ``path`` here: ``agent/hello`` is ``spiffe://test.local/agent/hello``.

        A whole SPIFFE ID is returned as it is, of whatever domain.
        """
        return SpiffeID(path) if path.startswith("spiffe://") else SpiffeID.of(self.name, *path.split("/"))

    def issue(self, identity: str, *, lifetime: timedelta = _HOUR) -> X509Svid:
        """Issue an SVID for a path or a SPIFFE ID.

        Raises:
            IdentityError: the ID is of another trust domain.

        """
        start = self.clock.now() - _BACKDATE
        return self.authority.issue(self.id(identity), not_before=start, lifetime=lifetime + _BACKDATE)

    def provider(self, identity: str, *, lifetime: timedelta = _HOUR) -> MockIdentityProvider:
        """Return a provider of that identity; it renews its SVID at half of ``lifetime``."""
        return MockIdentityProvider(self.id(identity), trust_domain=self, lifetime=lifetime)

    def add_authority(self) -> None:
        """Take the first step of a rotation: a new root signs from now on; the old one is trusted, too."""
        self.authority.rotate()
        self._announce()

    def renew_all(self) -> None:
        """Take the second step: every provider gets an SVID that the newest root signed."""
        for provider in self._providers:
            provider.renew()

    def retire_old_authorities(self) -> None:
        """Take the last step: what older roots signed is trusted no more."""
        self.authority.retire()
        self._announce()

    def rotate_ca(self) -> None:
        """Take all three steps at once: whoever has not got the news refuses the others, and is refused."""
        self.add_authority()
        self.renew_all()
        self.retire_old_authorities()

    def enrol(self, provider: MockIdentityProvider) -> None:
        """Have ``provider`` told of changes."""
        self._providers.append(provider)

    def _announce(self) -> None:
        for provider in self._providers:
            provider.announce()


class MockIdentityProvider(IdentityProvider):
    """Hands out SVIDs of a throwaway trust domain, as the Workload API does for a workload.

    The certificates are real, so that everything that checks them can. ``lifetime`` is that of each SVID;
    it is renewed at half of it. ``federated`` are other domains whose bundles are handed out, too. Without
    ``trust_domain`` there is a new one, of the domain that ``spiffe_id`` names.
    """

    def __init__(
        self,
        spiffe_id: str = f"spiffe://{DEFAULT_TRUST_DOMAIN}/agent/test",
        *,
        trust_domain: TrustDomain | None = None,
        lifetime: timedelta = _HOUR,
        federated: Iterable[TrustDomain] = (),
    ) -> None:
        self._id = SpiffeID(spiffe_id)
        self._domain = trust_domain if trust_domain is not None else TrustDomain(self._id.trust_domain)
        self._lifetime = lifetime
        self._foreign = {domain.name: domain for domain in federated}
        self._svid = self._domain.issue(self._id, lifetime=lifetime)
        self._changed = asyncio.Event()
        self._domain.enrol(self)
        for domain in self._foreign.values():
            domain.enrol(self)

    @property
    def trust_domain(self) -> TrustDomain:
        """The domain whose SVIDs these are."""
        return self._domain

    async def get_svid(self) -> X509Svid:
        """Return the current SVID."""
        return self._svid

    async def get_trust_bundle(self, trust_domain: str) -> X509Bundle:
        """Return the bundle of the own domain, or of a federated one.

        Raises:
            BundleUnavailableError: it is neither.

        """
        if trust_domain == self._domain.name:
            return self._domain.bundle
        if trust_domain not in self._foreign:
            raise BundleUnavailableError(f"{trust_domain} is not federated", trust_domain=trust_domain)
        return self._foreign[trust_domain].bundle

    def get_spiffe_id(self) -> str:
        """Return whose identity it is."""
        return str(self._id)

    async def wait_for_update(self) -> None:
        """Return when there is a new SVID or bundle; at half of the SVID's lifetime there is one."""
        left = (self._svid.expiry - self._domain.clock.now()).total_seconds()
        with anyio.move_on_after(max(0.0, left - self._lifetime.total_seconds() / 2)):
            await self._changed.wait()
        if not self._changed.is_set():
            self.renew()
        self._changed.clear()

    def renew(self) -> None:
        """Get a new SVID now."""
        self._svid = self._domain.issue(self._id, lifetime=self._lifetime)
        self.announce()

    def replace(self, svid: X509Svid) -> None:
        """Hand out ``svid`` from now on, whatever it is: expired, of another domain, anybody's."""
        self._svid = svid
        self.announce()

    def announce(self) -> None:
        """Tell whoever waits that something has changed."""
        self._changed.set()
