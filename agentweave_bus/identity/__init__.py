"""Who this process is, whom it believes, and TLS that checks both.

Start with :class:`IdentitySource` over one of the providers: :class:`SPIFFEIdentityProvider` (the SPIFFE
Workload API, in production SPIRE's agent) or :class:`StaticMTLSProvider` (files, for development).
"""

from agentweave_bus.identity.authority import Authority
from agentweave_bus.identity.bundle import TrustSource, X509Bundle
from agentweave_bus.identity.chain import ChainVerifier, VerifiedChain, claimed_spiffe_id, verify_chain
from agentweave_bus.identity.provider import IdentityProvider
from agentweave_bus.identity.retired import RetiredAuthorities
from agentweave_bus.identity.revocation import RevocationList, RevokedSet
from agentweave_bus.identity.revocation_file import RevocationWatch
from agentweave_bus.identity.rotation import IdentitySnapshot, IdentitySource, RotationHooks
from agentweave_bus.identity.static import StaticMTLSProvider
from agentweave_bus.identity.svid import X509Svid
from agentweave_bus.identity.tls import PeerRefusedError, client_context, server_context, verified_peer
from agentweave_bus.identity.workload_api import SPIFFEIdentityProvider
from agentweave_bus.spiffe_id import SpiffeID

__all__ = [
    "Authority",
    "ChainVerifier",
    "IdentityProvider",
    "IdentitySnapshot",
    "IdentitySource",
    "PeerRefusedError",
    "RetiredAuthorities",
    "RevocationList",
    "RevocationWatch",
    "RevokedSet",
    "RotationHooks",
    "SPIFFEIdentityProvider",
    "SpiffeID",
    "StaticMTLSProvider",
    "TrustSource",
    "VerifiedChain",
    "X509Bundle",
    "X509Svid",
    "claimed_spiffe_id",
    "client_context",
    "server_context",
    "verified_peer",
    "verify_chain",
]
