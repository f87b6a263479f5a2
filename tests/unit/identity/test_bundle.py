"""Bundles: one domain each."""

from __future__ import annotations

import pytest

from agentweave_bus.exceptions import BundleUnavailableError, InvalidSpiffeIdError
from agentweave_bus.identity import Authority, X509Bundle


def test_a_bundle_reads_what_it_wrote():
    authority = Authority("example.test")
    authority.rotate()
    bundle = authority.bundle
    assert len(bundle.authorities) == 2
    assert X509Bundle.from_pem("example.test", bundle.to_pem()) == bundle
    assert X509Bundle.from_der("example.test", bundle.to_der()) == bundle


def test_order_does_not_matter_but_domain_and_content_do():
    authority = Authority("example.test")
    one = authority.bundle
    authority.rotate()
    two = authority.bundle
    turned = X509Bundle("example.test", tuple(reversed(two.authorities)))
    assert two == turned
    assert hash(two) == hash(turned)
    assert one != two
    assert one != X509Bundle("other.test", one.authorities)
    assert one != "something else"


def test_empty_and_unreadable_bundles_name_their_domain():
    for make in (
        lambda: X509Bundle("example.test", ()),
        lambda: X509Bundle.from_pem("example.test", b"rubbish"),
        lambda: X509Bundle.from_der("example.test", [b"rubbish"]),
        lambda: X509Bundle.from_der("example.test", []),
    ):
        with pytest.raises(BundleUnavailableError, match=r"example\.test") as refusal:
            make()
        assert refusal.value.trust_domain == "example.test"
    with pytest.raises(InvalidSpiffeIdError):
        X509Bundle("Example.test", Authority("example.test").bundle.authorities)
