"""Certificates that no honest authority would issue, signed by one that is trusted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agentweave_bus.identity import Authority

BOTH_ROLES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
_HASHES = {"secp384r1": hashes.SHA384, "secp521r1": hashes.SHA512}
_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


@dataclass(frozen=True)
class Papers:
    """A chain and the key of its leaf, with none of the rules that an SVID must satisfy."""

    cert_chain: tuple[bytes, ...]
    private_key: Any

    @property
    def x5t(self) -> bytes:
        return hashlib.sha256(self.cert_chain[0]).digest()


@dataclass(frozen=True)
class Signer:
    """Who signs certificates: its name and key, and what it sends along."""

    name: x509.Name
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate | None = None

    @classmethod
    def of(cls, authority: Authority) -> Signer:
        """The root of an authority, whose certificate everybody has."""
        return cls(authority._root.certificate.subject, authority._root.key)

    @property
    def sent(self) -> tuple[bytes, ...]:
        return () if self.certificate is None else (self.certificate.public_bytes(Encoding.DER),)


def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def usage(*names: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in names for name in _USAGES})


def leaf(
    signer: Signer,
    uris: Iterable[str],
    *,
    key: Any = None,
    ca: bool = False,
    key_usage: x509.KeyUsage | None = usage("digital_signature"),  # noqa: B008 - never changed
    critical: bool = True,
    extended: Iterable[x509.ObjectIdentifier] | None = BOTH_ROLES,
    names: Iterable[x509.GeneralName] = (),
    minutes: tuple[float, float] = (-60, 60),
) -> Papers:
    """A leaf as a trusted signer can be made to sign it. ``minutes`` is its validity, from now."""
    key = key if key is not None else p256()
    builder = _builder(named("leaf"), key.public_key(), signer, minutes)
    general = [*map(x509.UniformResourceIdentifier, uris), *names]
    if general:
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    if key_usage is not None:
        builder = builder.add_extension(key_usage, critical=critical)
    if extended is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(extended), critical=False)
    signed = builder.sign(signer.key, hashes.SHA256()).public_bytes(Encoding.DER)
    return Papers((signed, *signer.sent), key)


def issuer(
    name: x509.Name,
    signer: Signer | None = None,
    *,
    key: Any = None,
    minutes: tuple[float, float] = (-60, 60),
) -> Signer:
    """A certificate for signing certificates, by ``signer`` or by itself."""
    key = key if key is not None else p256()
    by = signer if signer is not None else Signer(name, key)
    certificate = (
        _builder(name, key.public_key(), by, minutes)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage("key_cert_sign", "crl_sign"), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(by.key, hashes.SHA256())
    )
    return Signer(name, key, certificate)


def named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def signature(key: Any, data: bytes) -> bytes:
    """Sign with any key, by the algorithm that its kind is used with."""
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(data, padding.PKCS1v15(), hashes.SHA256())
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(data, ec.ECDSA(_HASHES.get(key.curve.name, hashes.SHA256)()))
    return bytes(key.sign(data))


def _builder(
    subject: x509.Name, key: Any, signer: Signer, minutes: tuple[float, float]
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    start, end = (now + timedelta(minutes=one) for one in minutes)
    signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key())
    return x509.CertificateBuilder(
        signer.name, subject, key, x509.random_serial_number(), start, end
    ).add_extension(signed_by, critical=False)
