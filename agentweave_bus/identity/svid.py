"""X.509-SVIDs: a workload's certificate chain with its private key.

An :class:`X509Svid` has passed the strict leaf rules and holds the key that belongs to the leaf. That
it chains to a bundle is not its business; :mod:`agentweave_bus.identity.chain` verifies.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
    load_pem_private_key,
)

from agentweave_bus.exceptions import SvidUnavailableError
from agentweave_bus.identity.chain import check_leaf, load_certificate
from agentweave_bus.identity.memory_file import MemoryFile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["X509Svid"]


class _Derived:
    """What an SVID computes once and keeps: the parsed leaf, and files made on demand."""

    __slots__ = ("chain_file", "key_file", "leaf", "x5t")

    def __init__(self, leaf_der: bytes) -> None:
        self.leaf = load_certificate(leaf_der)
        self.x5t = hashlib.sha256(leaf_der).digest()
        self.chain_file: MemoryFile | None = None
        self.key_file: MemoryFile | None = None


@dataclass(frozen=True, slots=True, repr=False)
class X509Svid:
    """An identity document and its key. Build one with :meth:`from_der` or :meth:`from_pem`.

    ``cert_chain`` is DER, leaf first, intermediates after it. ``private_key`` never leaves memory; the
    two paths name memory files, made when first asked for. Equal when the chains are.
    """

    spiffe_id: SpiffeID
    cert_chain: tuple[bytes, ...]
    private_key: ec.EllipticCurvePrivateKey = field(compare=False)
    _derived: _Derived = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if not self.cert_chain:
            raise SvidUnavailableError("an X.509-SVID without a certificate")
        object.__setattr__(self, "_derived", _Derived(self.cert_chain[0]))
        spiffe_id, public_key = check_leaf(self.leaf)
        if spiffe_id != self.spiffe_id:
            raise SvidUnavailableError(f"the certificate is that of {spiffe_id}, not of {self.spiffe_id}")
        if self.private_key.public_key() != public_key:
            raise SvidUnavailableError(f"the private key does not belong to the certificate of {spiffe_id}")

    def __repr__(self) -> str:
        return (
            f"X509Svid({str(self.spiffe_id)!r}, expiry={self.expiry.isoformat()}, x5t={self.x5t.hex()[:16]})"
        )

    @property
    def leaf(self) -> x509.Certificate:
        """The parsed leaf certificate."""
        return self._derived.leaf

    @property
    def x5t(self) -> bytes:
        """SHA-256 of the leaf's DER form, 32 bytes."""
        return self._derived.x5t

    @property
    def not_before(self) -> datetime:
        """Start of the leaf's validity, in UTC."""
        return self.leaf.not_valid_before_utc

    @property
    def expiry(self) -> datetime:
        """End of the leaf's validity, in UTC."""
        return self.leaf.not_valid_after_utc

    @property
    def cert_chain_path(self) -> str:
        """A path, for this process only, where the chain can be read as PEM."""
        if self._derived.chain_file is None:
            self._derived.chain_file = MemoryFile(self.chain_pem(), name="svid-chain")
        return self._derived.chain_file.path

    @property
    def private_key_path(self) -> str:
        """A path, for this process only, where the key can be read as unencrypted PKCS #8 PEM."""
        if self._derived.key_file is None:
            self._derived.key_file = MemoryFile(self.key_pem(), name="svid-key")
        return self._derived.key_file.path

    def chain_pem(self) -> bytes:
        """Return the chain as PEM blocks, leaf first."""
        return b"".join(load_certificate(der).public_bytes(Encoding.PEM) for der in self.cert_chain)

    def key_pem(self) -> bytes:
        """Return the private key as unencrypted PKCS #8 PEM."""
        return self.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def key_der(self) -> bytes:
        """Return the private key as unencrypted PKCS #8 DER."""
        return self.private_key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())

    @classmethod
    def from_der(cls, chain: Sequence[bytes], key: ec.EllipticCurvePrivateKey | bytes) -> X509Svid:
        """Build an SVID of DER certificates, leaf first, and its key (an object, or PKCS #8 DER).

        Raises:
            ChainRefusedError: the leaf breaks a rule of X.509-SVIDs.
            SvidUnavailableError: no certificate, no usable key, or the key is another's.

        """
        if not chain:
            raise SvidUnavailableError("an X.509-SVID without a certificate")
        spiffe_id, _ = check_leaf(load_certificate(chain[0]))
        private_key = _load_key(key) if isinstance(key, bytes) else key
        return cls(spiffe_id, tuple(bytes(der) for der in chain), private_key)

    @classmethod
    def from_pem(cls, chain: bytes, key: bytes) -> X509Svid:
        """Build an SVID of PEM certificate blocks, leaf first, and an unencrypted PEM key.

        Raises:
            ChainRefusedError: the leaf breaks a rule of X.509-SVIDs.
            SvidUnavailableError: no certificate, no usable key, or the key is another's.

        """
        try:
            certificates = x509.load_pem_x509_certificates(chain)
        except ValueError as error:
            raise SvidUnavailableError(f"no PEM certificate could be read: {error}") from error
        return cls.from_der([one.public_bytes(Encoding.DER) for one in certificates], _load_key(key))


def _load_key(key: bytes) -> ec.EllipticCurvePrivateKey:
    load = load_pem_private_key if key.lstrip().startswith(b"-----") else load_der_private_key
    try:
        loaded = load(key, password=None)
    except (ValueError, TypeError) as error:
        # The library's message may describe the content; the type is enough to act on.
        raise SvidUnavailableError(f"the private key can't be read ({type(error).__name__})") from None
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise SvidUnavailableError("the private key is no elliptic curve key; P-256 and P-384 are supported")
    return loaded
