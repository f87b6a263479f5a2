"""One chain, one trust domain, every rule."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from agentweave_bus.exceptions import ChainRefusedError, FederationError
from agentweave_bus.identity import (
    Authority,
    ChainVerifier,
    RevocationList,
    RevokedSet,
    SpiffeID,
    X509Bundle,
    claimed_spiffe_id,
    verify_chain,
)
from agentweave_bus.identity.chain import MAX_CERTIFICATE_BYTES, MAX_CHAIN_CERTIFICATES, load_certificate

X = SpiffeID("spiffe://example.test/agent/x")


def now_ms():
    return int(time.time() * 1000)


class Bundles:
    """A trust source over a plain mapping."""

    def __init__(self, *bundles):
        self.known = {bundle.trust_domain: bundle for bundle in bundles}

    def bundle_for(self, trust_domain):
        if trust_domain not in self.known:
            raise FederationError("not allowed", trust_domain=trust_domain)
        return self.known[trust_domain]


@pytest.mark.parametrize("intermediate", [False, True])
@pytest.mark.parametrize("curve", ["p256", "p384"])
def test_an_issued_svid_verifies_and_says_who_it_is(intermediate, curve):
    authority = Authority("example.test", intermediate=intermediate)
    svid = authority.issue(X, curve=curve)
    verified = verify_chain(svid.cert_chain, authority.bundle, at_ms=now_ms())
    assert verified.spiffe_id == X
    assert verified.x5t == svid.x5t
    assert verified.public_key == svid.private_key.public_key()
    assert verified.authority in authority.bundle.authority_fingerprints
    assert len(verified.issuers) == (2 if intermediate else 1)
    assert verified.not_after_ms == int(svid.expiry.timestamp()) * 1000


def test_validity_is_the_intersection_of_the_whole_path():
    start = datetime.now(UTC) - timedelta(minutes=1)
    authority = Authority("example.test", not_before=start, lifetime=timedelta(minutes=5))
    svid = authority.issue(X, not_before=start - timedelta(hours=1), lifetime=timedelta(hours=9))
    verified = verify_chain(svid.cert_chain, authority.bundle, at_ms=now_ms())
    assert verified.not_before_ms == int(start.timestamp()) * 1000
    assert verified.not_after_ms == int((start + timedelta(minutes=5)).timestamp()) * 1000
    assert verified.valid_at(verified.not_before_ms)
    assert verified.valid_at(verified.not_after_ms)
    assert not verified.valid_at(verified.not_before_ms - 1)
    assert not verified.valid_at(verified.not_after_ms + 1)


@pytest.mark.parametrize(("offset", "why"), [(3_700_000, "expired"), (-60_000, "valid from")])
def test_the_moment_decides_not_the_clock(offset, why):
    authority = Authority("example.test")
    svid = authority.issue(X)
    with pytest.raises(ChainRefusedError, match=why):
        verify_chain(svid.cert_chain, authority.bundle, at_ms=now_ms() + offset)
    end = int(svid.expiry.timestamp()) * 1000
    assert verify_chain(svid.cert_chain, authority.bundle, at_ms=end).not_after_ms == end
    with pytest.raises(ChainRefusedError, match="is valid from"):
        verify_chain(svid.cert_chain, authority.bundle, at_ms=end + 500)
    past = Authority("example.test", not_before=datetime(2001, 1, 1, tzinfo=UTC))
    old = past.issue(X, not_before=datetime(2001, 6, 1, tzinfo=UTC), lifetime=timedelta(hours=1))
    at = int(datetime(2001, 6, 1, 0, 30, tzinfo=UTC).timestamp()) * 1000
    assert verify_chain(old.cert_chain, past.bundle, at_ms=at).spiffe_id == X


@pytest.mark.parametrize("at_ms", [-1, 10**18, 2**63])
def test_an_absurd_moment_is_a_refusal(at_ms):
    authority = Authority("example.test")
    with pytest.raises(ChainRefusedError):
        verify_chain(authority.issue(X).cert_chain, authority.bundle, at_ms=at_ms)


def test_another_authority_of_the_same_name_is_refused():
    svid = Authority("example.test").issue(X)
    with pytest.raises(ChainRefusedError, match="does not verify"):
        verify_chain(svid.cert_chain, Authority("example.test").bundle, at_ms=now_ms())


def test_an_id_minted_by_another_domains_authority_is_refused():
    ours, theirs = Authority("example.test"), Authority("other.test")
    forged = theirs.issue(X, allow_foreign=True)
    verifier = ChainVerifier(Bundles(ours.bundle, theirs.bundle))
    with pytest.raises(ChainRefusedError, match=r"does not verify against the bundle of example\.test"):
        verifier.verify(forged.cert_chain, at_ms=now_ms())
    with pytest.raises(ChainRefusedError, match=r"not of the trust domain other\.test"):
        verify_chain(forged.cert_chain, theirs.bundle, at_ms=now_ms())
    assert len(verifier) == 0


def test_the_hand_made_leaf_is_good_before_it_is_broken(hand_made_ca):
    ca = hand_made_ca()
    bundle = X509Bundle("example.test", (ca.certificate,))
    assert verify_chain([ca.leaf()], bundle, at_ms=now_ms()).spiffe_id == X
    assert verify_chain([ca.leaf(extended=())], bundle, at_ms=now_ms()).spiffe_id == X
    with_dns = ca.leaf(names=[x509.DNSName("x.example.test")])
    assert verify_chain([with_dns], bundle, at_ms=now_ms()).spiffe_id == X


def _broken():
    def flags(**one):
        return lambda usage: {"key_usage": usage(**one)}

    signing = {"digital_signature": True}
    return [
        ("no name", "has 0", lambda _: {"uris": ()}),
        ("dns only", "has 0", lambda _: {"uris": (), "names": [x509.DNSName("example.test")]}),
        ("two uris", "has 2", lambda _: {"uris": (X, X + "y")}),
        ("the same uri twice", "has 2", lambda _: {"uris": (X, X)}),
        ("second uri not spiffe", "has 2", lambda _: {"uris": (X, "https://example.test")}),
        ("not spiffe", "no SPIFFE ID", lambda _: {"uris": ("https://example.test/x",)}),
        ("newline", "no SPIFFE ID", lambda _: {"uris": (X + "\n",)}),
        ("root path", "needs a path", lambda _: {"uris": ("spiffe://example.test",)}),
        ("ca", "CA certificate", lambda _: {"ca": True}),
        ("no usage", "no key usage", lambda _: {"with_usage": False}),
        ("usage not critical", "not critical", lambda _: {"usage_critical": False}),
        ("may not sign", "digitalSignature", flags(key_agreement=True)),
        ("cert sign", "keyCertSign", flags(key_cert_sign=True, **signing)),
        ("crl sign", "cRLSign", flags(crl_sign=True, **signing)),
        ("server only", "lacks", lambda _: {"extended": [ExtendedKeyUsageOID.SERVER_AUTH]}),
        ("client only", "lacks", lambda _: {"extended": [ExtendedKeyUsageOID.CLIENT_AUTH]}),
        ("any", "lacks", lambda _: {"extended": [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]}),
        ("p521", "P-384", lambda _: {"key": ec.generate_private_key(ec.SECP521R1())}),
        ("secp256k1", "P-384", lambda _: {"key": ec.generate_private_key(ec.SECP256K1())}),
        ("rsa", "P-384", lambda _: {"key": rsa.generate_private_key(65537, 2048)}),
    ]


@pytest.mark.parametrize(("why", "change"), [pytest.param(*row[1:], id=row[0]) for row in _broken()])
def test_each_rule_of_the_leaf(hand_made_ca, key_usage, why, change):
    ca = hand_made_ca()
    bundle = X509Bundle("example.test", (ca.certificate,))
    with pytest.raises(ChainRefusedError, match=why):
        verify_chain([ca.leaf(**change(key_usage))], bundle, at_ms=now_ms())


def test_a_leaf_that_is_its_own_anchor_is_refused(hand_made_ca):
    ca = hand_made_ca()
    leaf = ca.leaf()
    bundle = X509Bundle.from_der("example.test", [leaf])
    with pytest.raises(ChainRefusedError):
        verify_chain([leaf], bundle, at_ms=now_ms())


def test_a_missing_or_foreign_intermediate_is_refused():
    authority = Authority("example.test", intermediate=True)
    leaf = authority.issue(X).cert_chain[0]
    foreign = Authority("example.test", intermediate=True).issue(X).cert_chain[1]
    for chain in ([leaf], [leaf, foreign]):
        with pytest.raises(ChainRefusedError):
            verify_chain(chain, authority.bundle, at_ms=now_ms())


def test_an_svid_can_not_act_as_an_intermediate(hand_made_ca):
    ca = hand_made_ca()
    bundle = X509Bundle("example.test", (ca.certificate,))
    below = hand_made_ca()
    below.certificate = None
    below.name = x509.load_der_x509_certificate(ca.leaf(key=below.key)).subject
    with pytest.raises(ChainRefusedError):
        verify_chain([below.leaf(), ca.leaf(key=below.key)], bundle, at_ms=now_ms())


def test_bounds_and_rubbish():
    authority = Authority("example.test")
    leaf = authority.issue(X).cert_chain[0]
    root = authority.bundle.to_der()[0]
    for chain in (
        [],
        [b""],
        [b"rubbish"],
        [leaf + b"\0"],
        [leaf, *[root] * MAX_CHAIN_CERTIFICATES],
        [leaf, b"\x30" * (MAX_CERTIFICATE_BYTES + 1)],
    ):
        with pytest.raises(ChainRefusedError):
            verify_chain(chain, authority.bundle, at_ms=now_ms())
        with pytest.raises(ChainRefusedError):
            ChainVerifier(Bundles(authority.bundle)).verify(chain, at_ms=now_ms())
    assert verify_chain([leaf, root], authority.bundle, at_ms=now_ms()).spiffe_id == X
    with pytest.raises(ChainRefusedError, match=f"at most {MAX_CERTIFICATE_BYTES}"):
        load_certificate(b"\x30" * (MAX_CERTIFICATE_BYTES + 1))


def test_any_flipped_bit_of_the_leaf_is_refused():
    authority = Authority("example.test")
    leaf = authority.issue(X).cert_chain[0]
    for at in range(len(leaf) * 8):
        broken = bytearray(leaf)
        broken[at // 8] ^= 1 << at % 8
        with pytest.raises(ChainRefusedError):
            verify_chain([bytes(broken)], authority.bundle, at_ms=now_ms())


def test_a_claim_is_read_without_verifying():
    assert claimed_spiffe_id(
        Authority("nobody.test").issue(SpiffeID.of("nobody.test", "a")).cert_chain[0]
    ) == ("spiffe://nobody.test/a")


def test_an_unknown_domain_is_a_federation_error():
    verifier = ChainVerifier(Bundles(Authority("other.test").bundle))
    with pytest.raises(FederationError):
        verifier.verify(Authority("example.test").issue(X).cert_chain, at_ms=now_ms())


@pytest.fixture(params=[4096, 0], ids=["by its bytes", "by a digest"])
def remembered(request, monkeypatch):
    monkeypatch.setattr("agentweave_bus.identity.chain._MAX_KEY_BYTES", request.param)


@pytest.mark.usefixtures("remembered")
def test_a_remembered_chain_is_not_verified_again(monkeypatch):
    authority = Authority("example.test")
    svid = authority.issue(X)
    verifier = ChainVerifier(Bundles(authority.bundle))
    first = verifier.verify(svid.cert_chain, at_ms=now_ms())
    monkeypatch.setattr("agentweave_bus.identity.chain.verify_chain", None)
    assert verifier.verify(list(svid.cert_chain), at_ms=now_ms()) is first


def test_a_remembered_chain_still_expires():
    authority = Authority("example.test")
    svid = authority.issue(X)
    verifier = ChainVerifier(Bundles(authority.bundle))
    verified = verifier.verify(svid.cert_chain, at_ms=now_ms())
    with pytest.raises(ChainRefusedError):
        verifier.verify(svid.cert_chain, at_ms=verified.not_after_ms + 1000)


def test_a_remembered_chain_falls_with_its_authority_and_with_its_domain():
    authority = Authority("example.test")
    svid = authority.issue(X)
    trust = Bundles(authority.bundle)
    verifier = ChainVerifier(trust)
    verifier.verify(svid.cert_chain, at_ms=now_ms())
    authority.rotate()
    trust.known["example.test"] = authority.bundle
    assert verifier.verify(svid.cert_chain, at_ms=now_ms()).spiffe_id == X
    authority.retire()
    trust.known["example.test"] = authority.bundle
    with pytest.raises(ChainRefusedError):
        verifier.verify(svid.cert_chain, at_ms=now_ms())
    again = authority.issue(X)
    verifier.verify(again.cert_chain, at_ms=now_ms())
    del trust.known["example.test"]
    with pytest.raises(FederationError):
        verifier.verify(again.cert_chain, at_ms=now_ms())


def test_revocation_holds_for_remembered_chains_too():
    authority = Authority("example.test", intermediate=True)
    svid, other = authority.issue(X), authority.issue(X)
    revocations = RevocationList()
    verifier = ChainVerifier(Bundles(authority.bundle), revocations=revocations)
    verified = verifier.verify(svid.cert_chain, at_ms=now_ms())
    for revoked in (
        RevokedSet(spiffe_ids=frozenset({X})),
        RevokedSet(certificates=frozenset({svid.x5t})),
        RevokedSet(authorities=frozenset({verified.authority})),
        RevokedSet(authorities=frozenset({verified.issuers[0]})),
    ):
        revocations.replace(revoked)
        with pytest.raises(ChainRefusedError, match="revoked"):
            verifier.verify(svid.cert_chain, at_ms=now_ms())
    revocations.replace(RevokedSet(certificates=frozenset({svid.x5t})))
    assert verifier.verify(other.cert_chain, at_ms=now_ms()).spiffe_id == X
    revocations.replace(RevokedSet())
    assert verifier.verify(svid.cert_chain, at_ms=now_ms()).spiffe_id == X


def test_memory_is_bounded_and_the_used_stay(monkeypatch):
    authority = Authority("example.test")
    verifier = ChainVerifier(Bundles(authority.bundle), max_entries=3)
    svids = [authority.issue(SpiffeID.of("example.test", f"n{n}")) for n in range(5)]
    for svid in svids:
        verifier.verify(svids[0].cert_chain, at_ms=now_ms())
        verifier.verify(svid.cert_chain, at_ms=now_ms())
    assert len(verifier) == 3
    monkeypatch.setattr("agentweave_bus.identity.chain.verify_chain", None)
    for kept in (svids[0], svids[3], svids[4]):
        verifier.verify(kept.cert_chain, at_ms=now_ms())


@pytest.mark.usefixtures("remembered")
def test_bytes_can_not_move_between_certificates():
    authority = Authority("example.test", intermediate=True)
    leaf, middle = authority.issue(X).cert_chain
    verifier = ChainVerifier(Bundles(authority.bundle))
    verifier.verify([leaf, middle], at_ms=now_ms())
    with pytest.raises(ChainRefusedError):
        verifier.verify([leaf + middle], at_ms=now_ms())
    with pytest.raises(ChainRefusedError):
        verifier.verify([leaf + middle[:1], middle[1:]], at_ms=now_ms())


def test_a_certificate_has_one_encoding_only():
    authority = Authority("example.test")
    leaf = next(der for der in (authority.issue(X).cert_chain[0] for _ in range(200)) if der[-1] & 1 == 0)
    signature = x509.load_der_x509_certificate(leaf).signature
    loose = leaf[: -len(signature) - 1] + b"\x01" + signature
    assert x509.load_der_x509_certificate(loose).signature == signature
    with pytest.raises(ChainRefusedError, match="whole bytes"):
        verify_chain([loose], authority.bundle, at_ms=now_ms())
