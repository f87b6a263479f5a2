"""Trust bundles: the authorities of one trust domain, and of no other.

A bundle is a plain value. Bundles of several domains are kept beside each other in a mapping and are
never merged: an authority speaks for its own domain only (SPIFFE Trust Domain and Bundle, section 4).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import Store

from agentweave_bus.exceptions import BundleUnavailableError
from agentweave_bus.spiffe_id import check_trust_domain

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["EmptyBundleError", "PastTrust", "TrustSource", "X509Bundle"]


class EmptyBundleError(BundleUnavailableError):
    """There is a trust bundle for ``trust_domain``, and no authority in it: it trusts nobody any more."""


@dataclass(frozen=True)
class X509Bundle:
    """The X.509 authorities of ``trust_domain``.

    ``authorities`` are certificates (at least one). Two bundles are equal when domain and
    authorities are, in any order.

    Raises:
        EmptyBundleError: there is no authority in it.
        InvalidSpiffeIdError: ``trust_domain`` is no trust domain name.

    """

    trust_domain: str
    authorities: tuple[x509.Certificate, ...]

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        if not self.authorities:
            raise EmptyBundleError(
                f"the trust bundle of {self.trust_domain} holds no authority",
                trust_domain=self.trust_domain,
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, X509Bundle):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"X509Bundle({self.trust_domain!r}, {len(self.authorities)} authorities)"

    @cached_property
    def authority_fingerprints(self) -> frozenset[bytes]:
        """SHA-256 of each authority's DER form."""
        return frozenset(hashlib.sha256(der).digest() for der in self.to_der())

    @cached_property
    def fingerprint(self) -> bytes:
        """SHA-256 over the domain and the sorted fingerprints: the same for the same content."""
        digest = hashlib.sha256(self.trust_domain.encode() + b"\0")
        for one in sorted(self.authority_fingerprints):
            digest.update(one)
        return digest.digest()

    @cached_property
    def store(self) -> Store:
        """The verification store of this domain's authorities alone."""
        return Store(list(self.authorities))

    def to_der(self) -> tuple[bytes, ...]:
        """DER of each authority, in order."""
        return tuple(authority.public_bytes(Encoding.DER) for authority in self.authorities)

    def to_pem(self) -> bytes:
        """All authorities as PEM blocks, in order."""
        return b"".join(authority.public_bytes(Encoding.PEM) for authority in self.authorities)

    @classmethod
    def from_der(cls, trust_domain: str, authorities: Iterable[bytes]) -> X509Bundle:
        """Build a bundle from one DER certificate per item.

        Raises:
            BundleUnavailableError: an item is no certificate, or there is none.

        """
        try:
            parsed = tuple(x509.load_der_x509_certificate(der) for der in authorities)
        except ValueError as error:
            raise _unreadable(trust_domain, error) from error
        return cls(trust_domain, parsed)

    @classmethod
    def from_pem(cls, trust_domain: str, pem: bytes) -> X509Bundle:
        """Build a bundle from PEM blocks.

        Raises:
            BundleUnavailableError: there is no readable certificate in ``pem``.

        """
        try:
            parsed = tuple(x509.load_pem_x509_certificates(pem))
        except ValueError as error:
            raise _unreadable(trust_domain, error) from error
        return cls(trust_domain, parsed)


class TrustSource(Protocol):
    """Gives the bundle of one trust domain. Never a merged one."""

    def bundle_for(self, trust_domain: str) -> X509Bundle:
        """Return the bundle of ``trust_domain``.

        Raises:
            FederationError: the domain is not allowed, or its bundle is missing.

        """
        ...


class PastTrust(Protocol):
    """Knows which authorities were in a trust domain's bundle at a time that has passed, and left since."""

    def bundle_at(self, trust_domain: str, at_ms: int, *, now_ms: int) -> X509Bundle | None:
        """Return those that were in it at ``at_ms`` and left later; ``None`` when there is none."""
        ...

    def left_at(self, trust_domain: str, fingerprint: bytes, at_ms: int, *, now_ms: int) -> int | None:
        """Return when one of those left, found by SHA-256 of its DER; ``None`` when it is none of them."""
        ...


def _unreadable(trust_domain: str, error: ValueError) -> BundleUnavailableError:
    return BundleUnavailableError(
        f"the trust bundle of {trust_domain} can't be read: {error}", trust_domain=trust_domain
    )
