"""Peer rules: whom they admit, and malformed ones."""

from __future__ import annotations

import pytest

from agentweave_bus.agent import requires_federated_peer, requires_peer
from agentweave_bus.agent.peers import PeerPatterns, TrustDomains
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.spiffe_id import SpiffeID


@pytest.mark.parametrize(
    ("caller", "admitted"),
    [
        ("spiffe://acme-corp.io/agent/billing", True),
        ("spiffe://other-partner.io/x", True),
        ("spiffe://acme-corp.io.evil.example/agent/billing", False),
        ("spiffe://evil.example/acme-corp.io", False),
    ],
)
def test_trust_domains(caller: str, *, admitted: bool) -> None:
    rule = TrustDomains.of(["acme-corp.io", "other-partner.io"])
    assert (rule.refusal(SpiffeID(caller)) is None) is admitted


@pytest.mark.parametrize(
    ("caller", "admitted"),
    [
        ("spiffe://a.io/agent/order", True),
        ("spiffe://a.io/agent/eu/order", True),
        ("spiffe://a.io/agent", False),
        ("spiffe://a.io/agents/order", False),
        ("spiffe://b.io/agent/order", False),
        ("spiffe://b.io/exact", True),
        ("spiffe://b.io/exact/below", False),
        ("spiffe://b.io/exactly", False),
    ],
)
def test_patterns(caller: str, *, admitted: bool) -> None:
    rule = PeerPatterns.of(["spiffe://a.io/agent/*", "spiffe://b.io/exact"])
    assert (rule.refusal(SpiffeID(caller)) is None) is admitted


def test_a_whole_trust_domain_is_a_pattern() -> None:
    rule = PeerPatterns.of(["spiffe://a.io/*"])
    assert rule.refusal(SpiffeID("spiffe://a.io/x")) is None
    assert rule.refusal(SpiffeID("spiffe://a.iox/x"))


@pytest.mark.parametrize(
    "patterns",
    [(), ("*",), ("spiffe://a.io/ag*",), ("spiffe://*/agent",), ("a.io",), ("spiffe://A.io/x",), (3,)],
)
def test_malformed_patterns_are_refused(patterns: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="peer pattern"):
        requires_peer(*patterns)


@pytest.mark.parametrize("domains", [[], ["spiffe://a.io"], ["A.io"], [""], [None]])
def test_malformed_trust_domains_are_refused(domains: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="trust domain"):
        requires_federated_peer(trust_domains=domains)


def test_a_lone_text_is_no_list_of_trust_domains() -> None:
    with pytest.raises(ConfigurationError, match=r"Write \['acme-corp.io'\]"):
        requires_federated_peer(trust_domains="acme-corp.io")
