"""Verification of X.509-SVID chains: the one place where a chain becomes an identity.

:func:`verify_chain` checks one chain against the bundle of one trust domain; :class:`ChainVerifier`
chooses that bundle by the domain that the leaf claims, remembers what verified, and asks the
revocation list. Nothing here reads a clock, a file or the network: the moment is an argument.

A leaf must satisfy more than path validation asks for (SPIFFE X509-SVID sections 2 to 5): exactly one
URI name, which is a SPIFFE ID with a path; no CA; critical key usage with ``digitalSignature`` and
neither ``keyCertSign`` nor ``cRLSign``; when extended key usage is present, both ``serverAuth`` and
``clientAuth``. Because a leaf must be good for both roles, one verification serves servers, clients
and envelopes alike, and the cache needs no purpose in its key.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, VerificationError

from agentweave_bus.exceptions import ChainRefusedError, InvalidSpiffeIdError
from agentweave_bus.identity.revocation import RevocationList
from agentweave_bus.spiffe_id import SpiffeID

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agentweave_bus.identity.bundle import PastTrust, TrustSource, X509Bundle

__all__ = [
    "MAX_CERTIFICATE_BYTES",
    "MAX_CHAIN_CERTIFICATES",
    "ChainVerifier",
    "VerifiedChain",
    "check_leaf",
    "claimed_spiffe_id",
    "load_certificate",
    "verify_chain",
]

MAX_CHAIN_CERTIFICATES: Final = 8
MAX_CERTIFICATE_BYTES: Final = 16 * 1024

_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)
# What the parser raises, on access, about bytes that a stranger may have chosen.
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    Warning,  # about oddities, where warnings are errors
)
_ChainKey: TypeAlias = tuple[bytes, ...] | bytes
_MAX_KEY_BYTES: Final = 4096  # the chains of SVIDs have a third of that
_BOTH_ROLES: Final = frozenset({ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH})


@dataclass(frozen=True, slots=True)
class VerifiedChain:
    """A chain that verified, with what callers need of it.

    ``x5t`` is SHA-256 of the leaf's DER, ``authority`` SHA-256 of the anchoring authority's DER, and
    ``issuers`` the same of every certificate above the leaf, the anchor last. ``not_before_ms`` and
    ``not_after_ms`` (milliseconds since the epoch, both inclusive) are the intersection of the validity
    periods of every certificate on the verified path. ``issued_ms`` is when the leaf's own validity begins:
    with another intermediate that of the path could begin later, and the sender chooses those.
    """

    spiffe_id: SpiffeID
    leaf: x509.Certificate
    public_key: ec.EllipticCurvePublicKey
    x5t: bytes
    not_before_ms: int
    not_after_ms: int
    authority: bytes
    issuers: tuple[bytes, ...] = ()
    issued_ms: int = 0

    def valid_at(self, ms: int) -> bool:
        """Whether every certificate of the path is valid at ``ms``."""
        return self.not_before_ms <= ms <= self.not_after_ms


def load_certificate(der: bytes) -> x509.Certificate:
    """Parse one DER certificate of bounded size.

    Raises:
        ChainRefusedError: too large, or no certificate.

    """
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise ChainRefusedError(
            f"a certificate has {len(der)} bytes; at most {MAX_CERTIFICATE_BYTES} are read"
        )
    with _unreadable_is_refused("a certificate of the chain"):
        certificate = x509.load_der_x509_certificate(der)
        # The parser overlooks a count of unused bits that is not zero, so one certificate could have
        # several encodings. Nothing else in it is unsigned.
        if not der.endswith(b"\0" + certificate.signature):
            raise ChainRefusedError("a certificate of the chain has a signature that is no whole bytes")
        return certificate


def claimed_spiffe_id(leaf_der: bytes) -> SpiffeID:
    """Return the SPIFFE ID that a leaf claims. Nothing about it is verified.

    Raises:
        ChainRefusedError: not exactly one URI name, or it is no SPIFFE ID (X509-SVID section 2).

    """
    return _spiffe_id_of(load_certificate(leaf_der))


def check_leaf(leaf: x509.Certificate) -> tuple[SpiffeID, ec.EllipticCurvePublicKey]:
    """Check every rule that an SVID leaf must satisfy by itself; return its ID and public key.

    Raises:
        ChainRefusedError: a rule is broken; the message names it.

    """
    spiffe_id = _spiffe_id_of(leaf)
    if not spiffe_id.path:
        raise ChainRefusedError(
            f"{spiffe_id} names a trust domain, not a workload: the leaf's ID needs a path"
        )
    with _unreadable_is_refused(f"the leaf of {spiffe_id}"):
        _check_not_ca(leaf, spiffe_id)
        _check_key_usage(leaf, spiffe_id)
        _check_extended_key_usage(leaf, spiffe_id)
        key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise ChainRefusedError(f"the key of {spiffe_id} is neither P-256 nor P-384")
    return spiffe_id, key


def verify_chain(chain: Sequence[bytes], bundle: X509Bundle, *, at_ms: int) -> VerifiedChain:
    """Verify ``chain`` (DER, leaf first) against ``bundle`` as of ``at_ms``.

    Raises:
        ChainRefusedError: any rule of the leaf or of path validation is broken, the chain is outside
            its validity, or the leaf's trust domain is not the bundle's.

    """
    certificates = _load_chain(chain)
    leaf = certificates[0]
    spiffe_id, public_key = check_leaf(leaf)
    if spiffe_id.trust_domain != bundle.trust_domain:
        raise ChainRefusedError(f"{spiffe_id} is not of the trust domain {bundle.trust_domain}")
    path = _build_path(leaf, certificates[1:], bundle, at_ms, spiffe_id)
    not_before, not_after = _validity_ms(path)
    issuers = tuple(_sha256(certificate) for certificate in path[1:])
    x5t = hashlib.sha256(chain[0]).digest()
    issued = int(leaf.not_valid_before_utc.timestamp()) * 1000
    verified = VerifiedChain(
        spiffe_id, leaf, public_key, x5t, not_before, not_after, issuers[-1], issuers, issued
    )
    if not verified.valid_at(at_ms):
        raise ChainRefusedError(_outside_validity(verified, at_ms))
    return verified


class ChainVerifier:
    """Verifies chains against the bundle of their own trust domain, and remembers those that verified.

    A remembered chain is found by all its bytes, a long one by SHA-256 over them. On every use the trust
    source is asked again, the anchoring authority must still be in the bundle, the moment must lie in the
    validity of the whole path, and the revocation list must not name it. At most ``max_entries`` chains are
    kept; the least recently used leave first. One instance belongs to one event loop or thread.

    ``retired`` are authorities that have left their bundle. :meth:`verify` knows nothing of them.
    """

    def __init__(
        self,
        trust: TrustSource,
        *,
        revocations: RevocationList | None = None,
        retired: PastTrust | None = None,
        max_entries: int = 4096,
    ) -> None:
        self._trust = trust
        self._revocations = revocations if revocations is not None else RevocationList()
        self._max_entries = max_entries
        self._verified: OrderedDict[_ChainKey, VerifiedChain] = OrderedDict()
        self._retired = retired
        self._once_verified: OrderedDict[_ChainKey, VerifiedChain] = OrderedDict()  # by retired ones, apart

    @property
    def revocations(self) -> RevocationList:
        """The list that is asked on every use."""
        return self._revocations

    def __len__(self) -> int:
        return len(self._verified)

    def verify(self, chain: Sequence[bytes], *, at_ms: int) -> VerifiedChain:
        """Verify ``chain`` (DER, leaf first) as of ``at_ms``, from memory where that is sound.

        Raises:
            FederationError: the leaf's trust domain is not allowed, or its bundle is missing.
            ChainRefusedError: the chain does not verify, or is revoked.

        """
        key = _chain_key(chain)
        verified = self._recall(key, at_ms)
        if verified is None:
            verified = self._verify_anew(chain, at_ms)
            self._remember(key, verified)
        reason = self._revocations.reason_against(
            verified.spiffe_id, verified.x5t, verified.issuers, issued_ms=verified.issued_ms
        )
        if reason is not None:
            raise ChainRefusedError(f"{verified.spiffe_id} is refused: {reason}")
        return verified

    def verify_retired(
        self, chain: Sequence[bytes], *, now_ms: int, stored_at_ms: int, signed_at_ms: int | None = None
    ) -> VerifiedChain:
        """Verify ``chain`` by an authority that has left its bundle, as of before it left.

        ``stored_at_ms`` is when a stream says that what the chain signed was there. The result is valid at
        that time, and not now: its ``not_after_ms`` lies before the authority left. What is remembered of it
        is never recalled by :meth:`verify`.

        With ``signed_at_ms`` the chain must be valid at that time, as the link of a delegation says it of
        itself, and the authority must still have been in the bundle at both.

        Raises:
            FederationError: the leaf's trust domain is not allowed now, or its bundle is missing.
            ChainRefusedError: no authority that was in the bundle at that time is remembered that vouches
                for the chain, or it is revoked.

        """
        at_ms = stored_at_ms if signed_at_ms is None else signed_at_ms
        key = _chain_key(chain)
        known = self._once_verified.get(key)
        verified = None if known is None else self._as_of(known, now_ms, at_ms, stored_at_ms)
        if verified is None:
            known = self._verify_by_retired(chain, now_ms, at_ms, stored_at_ms)
            verified = self._as_of(known, now_ms, at_ms, stored_at_ms)
            if verified is None:
                raise ChainRefusedError(_outside_validity(known, at_ms))
            self._once_verified[key] = known
            while len(self._once_verified) > self._max_entries:
                self._once_verified.popitem(last=False)
        reason = self._revocations.reason_against(
            verified.spiffe_id, verified.x5t, verified.issuers, issued_ms=verified.issued_ms
        )
        if reason is not None:
            raise ChainRefusedError(f"{verified.spiffe_id} is refused: {reason}")
        return verified

    def _as_of(
        self, known: VerifiedChain, now_ms: int, at_ms: int, stored_at_ms: int
    ) -> VerifiedChain | None:
        """Return ``known``, its end set to where its authority left, if that was after ``stored_at_ms``.

        ``None`` is returned if it was not, and if the chain was not good at ``at_ms``.
        """
        domain = known.spiffe_id.trust_domain
        self._trust.bundle_for(domain)
        left_ms = (
            None
            if self._retired is None
            else self._retired.left_at(domain, known.authority, stored_at_ms, now_ms=now_ms)
        )
        if left_ms is None:
            return None
        ended = replace(known, not_after_ms=min(known.not_after_ms, left_ms - 1, now_ms - 1))
        return ended if ended.valid_at(at_ms) else None

    def _verify_by_retired(
        self, chain: Sequence[bytes], now_ms: int, at_ms: int, stored_at_ms: int
    ) -> VerifiedChain:
        _check_chain_bounds(chain)
        domain = claimed_spiffe_id(chain[0]).trust_domain
        self._trust.bundle_for(domain)  # a domain whose bundle is not there now vouches for nobody
        bundle = (
            None if self._retired is None else self._retired.bundle_at(domain, stored_at_ms, now_ms=now_ms)
        )
        if bundle is None:
            raise ChainRefusedError(f"no authority that has left the bundle of {domain} since is known here")
        return verify_chain(chain, bundle, at_ms=at_ms)

    def _recall(self, key: _ChainKey, at_ms: int) -> VerifiedChain | None:
        verified = self._verified.get(key)
        if verified is None:
            return None
        bundle = self._trust.bundle_for(verified.spiffe_id.trust_domain)
        if verified.authority not in bundle.authority_fingerprints or not verified.valid_at(at_ms):
            # Another path of the same chain may still be good, so verify again before refusing.
            del self._verified[key]
            return None
        self._verified.move_to_end(key)
        return verified

    def _verify_anew(self, chain: Sequence[bytes], at_ms: int) -> VerifiedChain:
        _check_chain_bounds(chain)
        bundle = self._trust.bundle_for(claimed_spiffe_id(chain[0]).trust_domain)
        return verify_chain(chain, bundle, at_ms=at_ms)

    def _remember(self, key: _ChainKey, verified: VerifiedChain) -> None:
        self._verified[key] = verified
        while len(self._verified) > self._max_entries:
            self._verified.popitem(last=False)


def _chain_key(chain: Sequence[bytes]) -> _ChainKey:
    # To look for the bytes themselves is half the work of a digest. Long chains are kept as one, for room.
    return tuple(chain) if sum(map(len, chain)) <= _MAX_KEY_BYTES else _chain_digest(chain)


def _chain_digest(chain: Sequence[bytes]) -> bytes:
    # With the lengths, so that bytes can't move between certificates.
    parts = [part for der in chain for part in (len(der).to_bytes(8, "big"), der)]
    return hashlib.sha256(b"".join(parts)).digest()


def _check_chain_bounds(chain: Sequence[bytes]) -> None:
    if not 1 <= len(chain) <= MAX_CHAIN_CERTIFICATES:
        raise ChainRefusedError(
            f"the chain has {len(chain)} certificates; 1 to {MAX_CHAIN_CERTIFICATES} are accepted"
        )


def _load_chain(chain: Sequence[bytes]) -> list[x509.Certificate]:
    _check_chain_bounds(chain)
    return [load_certificate(der) for der in chain]


def _spiffe_id_of(leaf: x509.Certificate) -> SpiffeID:
    with _unreadable_is_refused("the leaf's names"):
        uris = _uri_names(leaf)
    if len(uris) != 1:
        raise ChainRefusedError(f"an X.509-SVID has exactly one URI name; this leaf has {len(uris)}")
    try:
        return SpiffeID(uris[0])
    except InvalidSpiffeIdError as error:
        raise ChainRefusedError(f"the leaf's URI name is no SPIFFE ID: {error}") from error


def _uri_names(leaf: x509.Certificate) -> list[str]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _check_not_ca(leaf: x509.Certificate, spiffe_id: SpiffeID) -> None:
    try:
        constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        return
    if constraints.ca:
        raise ChainRefusedError(f"the leaf of {spiffe_id} is a CA certificate")


def _check_key_usage(leaf: x509.Certificate, spiffe_id: SpiffeID) -> None:
    try:
        extension = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    except x509.ExtensionNotFound as error:
        raise ChainRefusedError(f"the leaf of {spiffe_id} has no key usage") from error
    usage = extension.value
    if not extension.critical:
        raise ChainRefusedError(f"the key usage of {spiffe_id}'s leaf is not critical")
    if not usage.digital_signature:
        raise ChainRefusedError(f"the leaf of {spiffe_id} may not sign (digitalSignature is not set)")
    if usage.key_cert_sign or usage.crl_sign:
        raise ChainRefusedError(f"the leaf of {spiffe_id} has a CA's key usage (keyCertSign or cRLSign)")


def _check_extended_key_usage(leaf: x509.Certificate, spiffe_id: SpiffeID) -> None:
    try:
        uses = frozenset(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return
    if not uses >= _BOTH_ROLES:
        raise ChainRefusedError(
            f"the extended key usage of {spiffe_id}'s leaf lacks serverAuth or clientAuth"
        )


def _build_path(
    leaf: x509.Certificate,
    intermediates: list[x509.Certificate],
    bundle: X509Bundle,
    at_ms: int,
    spiffe_id: SpiffeID,
) -> list[x509.Certificate]:
    try:
        moment = datetime.fromtimestamp(at_ms // 1000, UTC)
        builder = PolicyBuilder().store(bundle.store).time(moment).max_chain_depth(MAX_CHAIN_CERTIFICATES)
        path = builder.build_client_verifier().verify(leaf, intermediates).chain
    except (VerificationError, UnsupportedAlgorithm, ValueError, OverflowError, OSError) as error:
        raise ChainRefusedError(
            f"the chain of {spiffe_id} does not verify against the bundle of {bundle.trust_domain}: "
            f"{_plain(error)}{_expiry_note(leaf, at_ms)}"
        ) from error
    if len(path) < 2:  # noqa: PLR2004 - a leaf that is its own anchor proves nothing
        raise ChainRefusedError(f"the leaf of {spiffe_id} is itself in the bundle; an authority must sign it")
    return path


def _validity_ms(path: list[x509.Certificate]) -> tuple[int, int]:
    not_before = max(certificate.not_valid_before_utc for certificate in path)
    not_after = min(certificate.not_valid_after_utc for certificate in path)
    return int(not_before.timestamp()) * 1000, int(not_after.timestamp()) * 1000


@contextmanager
def _unreadable_is_refused(what: str) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        raise ChainRefusedError(f"{what} can't be read: {_first_line(error)}") from error


def _sha256(certificate: x509.Certificate) -> bytes:
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _plain(error: BaseException) -> str:
    text = _first_line(error)
    # What the library says of a chain whose signatures lead nowhere would help nobody.
    if "no interior errors" in text or "exceeds max depth" in text:
        return "no authority of that bundle signed it"
    return text


def _expiry_note(leaf: x509.Certificate, at_ms: int) -> str:
    seconds = at_ms / 1000
    if seconds > leaf.not_valid_after_utc.timestamp():
        return f" (the SVID expired at {leaf.not_valid_after_utc.isoformat()})"
    if seconds < leaf.not_valid_before_utc.timestamp():
        return f" (the SVID is valid from {leaf.not_valid_before_utc.isoformat()})"
    return ""


def _outside_validity(verified: VerifiedChain, at_ms: int) -> str:
    return (
        f"the chain of {verified.spiffe_id} is valid from {verified.not_before_ms} to "
        f"{verified.not_after_ms} ms, not at {at_ms}"
    )
