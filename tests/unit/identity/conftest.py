"""Certificates that break one rule each, and providers that tests steer by hand."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agentweave_bus.exceptions import BundleUnavailableError, SvidUnavailableError
from agentweave_bus.identity import IdentityProvider, IdentitySource

BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


class HandMadeCA:
    """A bare CA that signs whatever it is told to: a leaf with any extension wrong or missing."""

    def __init__(self, trust_domain="example.test"):
        self.trust_domain = trust_domain
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hand-made")])
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder(
                self.name,
                self.name,
                self.key.public_key(),
                1,
                now - timedelta(days=2),
                now + timedelta(days=2),
            )
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage(key_cert_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def leaf(
        self,
        uris=("spiffe://example.test/agent/x",),
        *,
        key=None,
        ca=False,
        key_usage=None,
        usage_critical=True,
        with_usage=True,
        extended=BOTH,
        names=(),
    ):
        key = key or ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(
            self.name,
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "leaf")]),
            key.public_key(),
            x509.random_serial_number(),
            now - timedelta(hours=1),
            now + timedelta(hours=1),
        )
        issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = builder.add_extension(issuer_key, critical=False)
        general = [x509.UniformResourceIdentifier(uri) for uri in uris] + list(names)
        if general:
            builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        if with_usage:
            wanted = key_usage or usage(digital_signature=True)
            builder = builder.add_extension(wanted, critical=usage_critical)
        if extended:
            builder = builder.add_extension(x509.ExtendedKeyUsage(extended), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.DER)


def usage(**flags):
    names = (
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
    return x509.KeyUsage(**{name: flags.get(name, False) for name in names})


class SteeredProvider(IdentityProvider):
    """Gives what a test puts in, and wakes whoever waits when told to."""

    def __init__(self, svid, *bundles):
        self.svid = svid
        self.bundles = {bundle.trust_domain: bundle for bundle in bundles}
        self.error = None
        self.changed = asyncio.Event()
        self.on_restart = None
        self.restarts = 0
        self.closed = 0

    async def get_svid(self):
        if self.error is not None:
            raise self.error
        return self.svid

    async def get_trust_bundle(self, trust_domain):
        try:
            return self.bundles[trust_domain]
        except KeyError:
            raise BundleUnavailableError("no bundle", trust_domain=trust_domain) from None

    def get_spiffe_id(self):
        if self.svid is None:
            raise SvidUnavailableError("none yet")
        return self.svid.spiffe_id

    async def wait_for_update(self):
        await self.changed.wait()
        self.changed.clear()

    async def restart(self):
        self.restarts += 1
        if self.on_restart is not None:
            self.on_restart()

    async def aclose(self):
        self.closed += 1


@pytest.fixture
def hand_made_ca():
    return HandMadeCA


@pytest.fixture
def key_usage():
    return usage


@pytest.fixture
def steered():
    return SteeredProvider


@pytest.fixture
def started():
    """Make a started source of an SVID and bundles."""

    async def start(svid, *bundles, **options):
        allowed = options.pop("allowed", [bundle.trust_domain for bundle in bundles])
        source = IdentitySource(SteeredProvider(svid, *bundles), allowed_trust_domains=allowed, **options)
        await source.start(5)
        return source

    return start
