"""The bus in memory: no server and no socket, and otherwise all that a call goes through in service."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from nats.aio.client import Client

from agentweave_bus.bus.streams import claim_stream
from agentweave_bus.config import AgentConfig
from agentweave_bus.control.broker import broker_users
from agentweave_bus.identity import IdentityProvider, X509Svid
from agentweave_bus.identity.chain import verify_chain
from agentweave_bus.runtime.surroundings import Surroundings
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.testing.bus import Bus, reconnects
from agentweave_bus.testing.clock import VirtualClock
from agentweave_bus.testing.memory_broker import MemoryBroker
from agentweave_bus.testing.memory_client import MemoryClient
from agentweave_bus.testing.participants import Participant
from agentweave_bus.testing.trust import DEFAULT_TRUST_DOMAIN, MockIdentityProvider, TrustDomain

__all__ = ["MemoryBus"]

_A_MINUTE_NS: Final = 60_000_000_000


class MemoryBus(Bus):
    """The bus in memory; see :class:`Bus`. Its clock is virtual.

    The broker's permissions are those that a real one is given from the same grants. In place of the TLS
    handshake it checks each connection's SVID against the bundle of its trust domain. Agents of several trust
    domains may meet on it: :meth:`domain` makes one when it is first named.
    """

    def __init__(self, trust_domain: str = DEFAULT_TRUST_DOMAIN, *, policy: Path | str | None = None) -> None:
        super().__init__(trust_domain, policy=policy)
        self._clock = VirtualClock()
        self._domains: dict[str, TrustDomain] = {}
        self._identities: set[SpiffeID] = set()
        self.broker = MemoryBroker(self._clock.time_ns)
        self.domain(trust_domain)

    @property
    def clock(self) -> VirtualClock:
        """The clock that everyone here goes by."""
        return self._clock

    def domain(self, name: str | None = None) -> TrustDomain:
        """Return a trust domain, by default the bus's own; one that is new here is made."""
        name = self.trust_domain if name is None else name
        if name not in self._domains:
            self._domains[name] = TrustDomain(name, clock=self._clock)
        return self._domains[name]

    async def rotate_ca(self, trust_domain: str | None = None) -> None:
        """Replace a trust domain's authority, by default that of the bus; see :meth:`Bus.rotate_ca`."""
        domain = self.domain(trust_domain)
        domain.add_authority()
        newest = domain.bundle.authority_fingerprints
        await self._until(
            lambda: all(
                one.source.bundle_for(domain.name).authority_fingerprints == newest
                for one in self._connected()
                if domain.name in one.source.allowed_trust_domains
            ),
            "everyone trusts the new authority",
        )
        mine = [one for one in self._connected() if one.me.trust_domain == domain.name]
        before = [reconnects(one) for one in mine]
        domain.renew_all()
        await self._until(
            lambda: all(reconnects(one) > count for one, count in zip(mine, before, strict=True)),
            "everyone is connected with a new SVID",
        )
        domain.retire_old_authorities()

    async def _start_broker(self) -> None:
        self._clock.follow()

    async def _stop_broker(self) -> None:
        await self.broker.close()

    async def _enter(self, identity: SpiffeID) -> None:
        if identity in self._identities:
            return
        self._identities.add(identity)
        self.domain(identity.trust_domain)
        stream = claim_stream(identity)
        # As if it had been there for a while: nothing can have been claimed in one before it.
        created_ns = self._clock.time_ns() - _A_MINUTE_NS
        self.broker.jetstream.add_stream(stream.config, created_ns=created_ns)
        await self._follow_grants()

    async def _follow_grants(self) -> None:
        self.broker.set_users(broker_users(self.grants, self._identities, control=()))

    def _provider(self, config: AgentConfig) -> IdentityProvider:
        identity = config.agent.spiffe_id
        others = set(config.identity.allowed_trust_domains or ()) - {identity.trust_domain}
        return MockIdentityProvider(
            identity,
            trust_domain=self.domain(identity.trust_domain),
            federated=[self.domain(name) for name in sorted(others)],
        )

    def _surroundings(self, participant: Participant) -> Surroundings:
        def new_client() -> Client:
            assert participant.parts is not None
            source = participant.parts.source
            user = participant.parts.config.agent.spiffe_id
            return MemoryClient(self.broker, user, check=lambda: self._check(source.svid)).as_client()

        return Surroundings(
            time_ns=self._clock.time_ns,
            monotonic_ns=self._clock.monotonic_ns,
            new_client=new_client,
            around_engine=self._switch.around,
            stop_signals=participant.signals,
            on_wired=participant.wired,
        )

    def _check(self, svid: X509Svid) -> None:
        """Refuse what a broker's TLS refuses. Raises IdentityError."""
        bundle = self.domain(svid.spiffe_id.trust_domain).bundle
        verify_chain(svid.cert_chain, bundle, at_ms=self._clock.time_ns() // 1_000_000)

    def _place(self, identity: SpiffeID) -> dict[str, Any]:
        broker = SpiffeID.of(identity.trust_domain, "agentweave", "broker")
        return {"bus.servers": ["tls://127.0.0.1:4222"], "bus.server_spiffe_id": broker}
