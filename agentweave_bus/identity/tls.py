"""TLS contexts that know whom they talk to.

The standard library's context has one pool of authorities for all trust domains and compares host
names. Neither is SPIFFE's idea of identity. So the pool only gets a handshake through: when it is done,
and before the event loop passes on any byte of the application in either direction, the chain that the
peer presented is verified again by :class:`~agentweave_bus.identity.chain.ChainVerifier` against its own
domain's bundle, and its SPIFFE ID compared with those expected. The check sits in ``do_handshake`` of an
``ssl.SSLObject`` subclass, so it holds under asyncio and uvloop, for NATS and for HTTP.

A context holds the SVID that it was made with. Whoever keeps one makes a new one when the identity
source announces a change.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any, Final

from agentweave_bus.exceptions import ChainRefusedError
from agentweave_bus.identity.chain import ChainVerifier
from agentweave_bus.identity.memory_file import MemoryFile
from agentweave_bus.spiffe_id import SpiffeID

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from agentweave_bus.identity.chain import VerifiedChain
    from agentweave_bus.identity.rotation import IdentitySource

    PeerRule = SpiffeID | Collection[str] | Callable[[SpiffeID], bool]

__all__ = ["PeerRefusedError", "client_context", "peer_chain", "server_context", "verified_peer"]

_DER: Final = 2  # _ssl.ENCODING_DER


class PeerRefusedError(ChainRefusedError, ssl.SSLCertVerificationError):
    """The TLS peer is not who it must be. Also an ``ssl.SSLError``, which event loops expect here.

    ``__cause__`` is the verifier's error, where one refused the chain.
    """


class _Context(ssl.SSLContext):
    """A context whose connections are checked by :attr:`check_peer` inside the handshake."""

    check_peer: Callable[[list[bytes]], VerifiedChain]


class _CheckedObject(ssl.SSLObject):
    """What event loops use. The handshake is not done before the peer is known."""

    verified_peer: VerifiedChain | None = None

    def do_handshake(self) -> None:
        super().do_handshake()
        self.verified_peer = _check(self)


class _CheckedSocket(ssl.SSLSocket):
    """What blocking code uses; likewise."""

    verified_peer: VerifiedChain | None = None

    @classmethod
    def _create(cls, *args: Any, **options: Any) -> Any:
        if len(args) > 2 or not options.get("do_handshake_on_connect", True):  # noqa: PLR2004
            # The first read would do an implicit handshake, which nothing could check.
            raise ValueError("these contexts need do_handshake_on_connect=True")
        return super()._create(*args, **options)  # type: ignore[misc]

    def do_handshake(self, block: bool = False) -> None:
        super().do_handshake(block)
        self.verified_peer = _check(self)


def client_context(
    source: IdentitySource,
    expected: PeerRule,
    *,
    verifier: ChainVerifier | None = None,
    minimum_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> ssl.SSLContext:
    """Make a context for connecting to ``expected``: an ID, several, or a predicate on the peer's ID.

    Pass the process's ``verifier`` so that its revocation list holds here, too. The host name given to
    the connection is sent as SNI and means nothing for identity.

    Raises:
        SvidUnavailableError: the source has no valid SVID.

    """
    return _context(ssl.PROTOCOL_TLS_CLIENT, source, expected, verifier, minimum_version)


def server_context(
    source: IdentitySource,
    accept: PeerRule,
    *,
    verifier: ChainVerifier | None = None,
    minimum_version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> ssl.SSLContext:
    """Make a context for serving peers that ``accept`` names; a client certificate is required.

    No session tickets are given: a resumed session shows no chain and could outlive a rotation.

    Raises:
        SvidUnavailableError: the source has no valid SVID.

    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, source, accept, verifier, minimum_version)
    context.num_tickets = 0
    return context


def verified_peer(connection: object) -> VerifiedChain | None:
    """Return what was verified of a connection's peer.

    ``connection`` is the ``ssl_object`` of a transport (``get_extra_info("ssl_object")``) or a socket.
    ``None`` means that it was not made by a context of this module.
    """
    if isinstance(connection, _CheckedObject | _CheckedSocket):
        return connection.verified_peer
    return None


def peer_chain(connection: ssl.SSLObject | ssl.SSLSocket) -> list[bytes]:
    """Return the certificates that the peer presented, DER, leaf first. Nothing about them is verified."""
    # 3.13 has public methods for this; the C object has had them since 3.10.
    presented = connection._sslobj.get_unverified_chain()  # type: ignore[union-attr]  # noqa: SLF001
    return [one if isinstance(one, bytes) else bytes(one.public_bytes(_DER)) for one in presented or ()]


def _check(connection: _CheckedObject | _CheckedSocket) -> VerifiedChain:
    context = connection.context
    if not isinstance(context, _Context):
        # ssl lets a server's SNI callback swap the context; the peer must not escape by it.
        raise PeerRefusedError("the connection's context was exchanged for one that checks no peer")
    return context.check_peer(peer_chain(connection))


def _context(
    protocol: int,
    source: IdentitySource,
    accept: PeerRule,
    verifier: ChainVerifier | None,
    minimum_version: ssl.TLSVersion,
) -> _Context:
    snapshot = source.current
    context = _Context(protocol)
    context.minimum_version = minimum_version
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    # An authority of a bundle is an anchor, whether or not it signed itself.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.options |= ssl.OP_NO_RENEGOTIATION
    for bundle in snapshot.bundles.values():
        context.load_verify_locations(cadata=b"".join(bundle.to_der()))
    with MemoryFile(snapshot.svid.chain_pem()) as chain, MemoryFile(snapshot.svid.key_pem()) as key:
        context.load_cert_chain(chain.path, key.path)
    chains = verifier if verifier is not None else ChainVerifier(source)
    context.check_peer = _peer_check(source, chains, accept)
    context.sslobject_class = _CheckedObject
    context.sslsocket_class = _CheckedSocket
    return context


def _peer_check(
    source: IdentitySource, verifier: ChainVerifier, accept: PeerRule
) -> Callable[[list[bytes]], VerifiedChain]:
    accepts, wanted = _as_predicate(accept)

    def check(chain: list[bytes]) -> VerifiedChain:
        try:
            verified = verifier.verify(chain, at_ms=source.now_ms)
            accepted = accepts(verified.spiffe_id)
        except Exception as error:
            # Also what should not happen: only an SSLError ends the connection cleanly in an event loop.
            raise PeerRefusedError(f"the TLS peer is refused: {error}") from error
        if not accepted:
            raise PeerRefusedError(f"the TLS peer is {verified.spiffe_id}, not {wanted}")
        return verified

    return check


def _as_predicate(accept: PeerRule) -> tuple[Callable[[SpiffeID], bool], str]:
    if isinstance(accept, str):  # a SpiffeID; plain text is checked to be one
        one = SpiffeID(accept)
        return lambda peer: peer == one, one
    if callable(accept):
        return accept, "one that is accepted here"
    several = frozenset(SpiffeID(one) for one in accept)
    return lambda peer: peer in several, "one of " + ", ".join(sorted(several))
