"""Grants of events: the shipped policy and the broker's permissions read them alike."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from agentweave_bus.authz import Grants
from agentweave_bus.authz.grants import Grant
from agentweave_bus.authz.policy_input import write_input
from agentweave_bus.authz.wasm import EmbeddedEngine
from agentweave_bus.exceptions import ConfigurationError

PUBLISHER = "spiffe://a.io/agent/order"
SUBSCRIBER = "spiffe://a.io/agent/shipping"
STRANGER = "spiffe://a.io/agent/stranger"
DOMAIN = "spiffe://a.io"

GRANTS = f"""\
grants:
  - caller: {PUBLISHER}
    callee: {SUBSCRIBER}
    capabilities: [order.*, invoice.paid, alone]
    kinds: event
  - caller: spiffe://a.io/client/*
    callee: {SUBSCRIBER}
    capabilities: ["*"]
    kinds: [event, call]
"""

CALLERS = (PUBLISHER, SUBSCRIBER, STRANGER, "spiffe://a.io/client/eu/cli")
CALLEES = (SUBSCRIBER, STRANGER, DOMAIN, "spiffe://b.io")
NAMES = (
    "order",
    "order.created",
    "order.line.added",
    "orders.created",
    "invoice.paid",
    "invoice",
    "alone",
    "x.y",
)
KINDS = ("event", "call", "task")


def test_the_shipped_policy_and_python_agree(tmp_path: Path) -> None:
    file = tmp_path / "grants.yaml"
    file.write_text(GRANTS)
    engine, grants = EmbeddedEngine.from_directory(tmp_path, cache=tmp_path / "cache"), Grants.load(file)
    allowed = set()
    for caller, callee, name, kind in product(CALLERS, CALLEES, NAMES, KINDS):
        asked = {
            "caller_spiffe_id": caller,
            "callee_spiffe_id": callee,
            "action": name,
            "direction": "inbound",
        }
        context = {"kind": kind, "payload": {}, "principal": None, "via": []}
        answer = engine.evaluate_now("agentweave/grants", write_input({**asked, "context": context})).result
        assert answer["allow"] is grants.permits(caller, callee, name, kind), (caller, callee, name, kind)
        if answer["allow"]:
            allowed.add((caller, callee, name, kind))
    assert (PUBLISHER, SUBSCRIBER, "order.line.added", "event") in allowed
    assert (PUBLISHER, DOMAIN, "order.created", "event") in allowed
    assert {one for one in allowed if one[0] == STRANGER} == set()
    assert {one for one in allowed if one[2] in ("order", "orders.created")} == {
        one
        for one in allowed
        if one[0].startswith("spiffe://a.io/client/") and one[2] in ("order", "orders.created")
    }
    assert not any(one[1] == DOMAIN and one[3] != "event" for one in allowed)


def test_a_scope_says_what_the_grants_give() -> None:
    grants = Grants.parse(GRANTS)
    given = [one for reach in grants.callees_of(PUBLISHER) for one in reach.scope_entries(PUBLISHER)]
    assert given == [f"{DOMAIN}#*", f"{DOMAIN}#invoice.paid", f"{DOMAIN}#alone"]
    both = [one for reach in grants.callees_of(CALLERS[-1]) for one in reach.scope_entries(CALLERS[-1])]
    assert both == [f"{SUBSCRIBER}#*", f"{DOMAIN}#*"]


@pytest.mark.parametrize(
    "pattern", ["order.*.paid", "*.paid", "order.", "order*", ".*", "order..*", "**", "order.>"]
)
def test_no_other_patterns_are_taken(pattern: str) -> None:
    with pytest.raises(ConfigurationError, match="no capability"):
        Grants.parse(f"grants: [{{caller: {PUBLISHER}, callee: {SUBSCRIBER}, capabilities: ['{pattern}']}}]")


def test_a_pattern_without_the_kind_is_told(tmp_path: Path) -> None:
    grant = Grant(caller=(PUBLISHER,), callee=(SUBSCRIBER,), capabilities=("order.*",))
    assert any("kinds does not list event" in one for one in Grants(grants=(grant,)).warnings())
