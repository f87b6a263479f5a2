"""The reference's policies as shipped: each rule that it shows, asked through the embedded engine."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus.authz.policy_input import write_input
from agentweave_bus.authz.policy_source import SHIPPED
from agentweave_bus.authz.wasm import EmbeddedEngine

DATA = Path(__file__).parent / "federation" / "partner" / "policies"
CLI = "spiffe://agentweave.io/client/cli"
BILLING, PAYMENT = "spiffe://acme-corp.io/agent/billing", "spiffe://partner.com/agent/payment"
ORCHESTRATOR, TARGET = "spiffe://company.com/agent/orchestrator", "spiffe://company.com/agent/search"
ORDERED = [
    {"iss": CLI, "aud": "spiffe://agentweave.io/agent/gateway", "cap": "route", "kind": "call"},
    {
        "iss": "spiffe://agentweave.io/agent/gateway",
        "aud": "spiffe://agentweave.io/agent/order",
        "cap": "create_order",
        "kind": "call",
    },
]
PAID = {
    "billing_id": "bill-456",
    "customer_id": "cust-123",
    "amount": "99.99",
    "currency": "USD",
    "description": "Monthly subscription",
}


def agent(name: str) -> str:
    return f"spiffe://agentweave.io/agent/{name}"


@pytest.fixture(scope="module")
def engine() -> EmbeddedEngine:
    """The shipped policies, with the reference's own policy data (its JSON, as it stands there)."""
    return EmbeddedEngine.from_directory(DATA)


def decide(
    engine: EmbeddedEngine, package: str, caller: str, callee: str, action: str, **context: Any
) -> dict[str, Any]:
    """Ask as the reference says, with ``context.payload`` and ``context.task_id``; return the decision."""
    question = {
        "caller_spiffe_id": caller,
        "callee_spiffe_id": callee,
        "action": action,
        "context": {"payload": {}, "task_id": "task-1", **context},
    }
    answer = engine.evaluate_now(package, write_input(question)).result
    return {"allow": answer} if isinstance(answer, bool) else answer


def allows(*question: Any, **context: Any) -> bool:
    verdict = decide(*question, **context)["allow"]
    assert isinstance(verdict, bool)
    return verdict


WRITTEN = [  # package, caller, callee, action, what the reference's rules say
    ("gateway/authz", agent("gateway"), agent("user"), "create_user", True),
    ("gateway/authz", agent("gateway"), agent("order"), "create_order", True),
    ("gateway/authz", agent("gateway"), "spiffe://elsewhere.io/agent/user", "create_user", False),
    ("gateway/authz", CLI, agent("gateway"), "route", True),
    ("gateway/authz", CLI, agent("gateway"), "health", True),
    ("gateway/authz", CLI, agent("gateway"), "shutdown", False),
    ("gateway/authz", CLI, agent("order"), "create_order", False),
    ("order/authz", agent("gateway"), agent("order"), "create_order", True),
    ("order/authz", agent("gateway"), agent("order"), "get_order", True),
    ("order/authz", CLI, agent("order"), "create_order", False),
    ("order/authz", agent("order"), agent("user"), "get_user", True),
    ("order/authz", agent("order"), agent("payment"), "process_payment", True),
    ("order/authz", agent("order"), agent("inventory"), "check_availability", True),
    ("order/authz", agent("order"), agent("gateway"), "route", False),
    ("user/authz", agent("gateway"), agent("user"), "create_user", True),
    ("user/authz", agent("gateway"), agent("user"), "get_user", True),
    ("user/authz", agent("order"), agent("user"), "get_user", True),
    ("user/authz", agent("order"), agent("user"), "update_tier", False),
    ("user/authz", agent("gateway"), agent("user"), "update_tier", False),
    ("user/authz", agent("admin"), agent("user"), "update_tier", True),
    ("company/authz", ORCHESTRATOR, TARGET, "search", True),
    ("company/authz", ORCHESTRATOR, TARGET, "index", True),
    ("company/authz", ORCHESTRATOR, TARGET, "delete", False),
    ("company/authz", TARGET, ORCHESTRATOR, "search", False),
]


@pytest.mark.parametrize(("package", "caller", "callee", "action", "expected"), WRITTEN)
def test_the_written_rules(
    engine: EmbeddedEngine, package: str, caller: str, callee: str, action: str, *, expected: bool
) -> None:
    assert allows(engine, package, caller, callee, action) is expected


CORRECTED = [  # what the reference's own walk-through needs and its rules deny; see the errata
    *[
        (f"{name}/authz", agent("gateway"), agent(name), "health")
        for name in ("user", "order", "payment", "inventory")
    ],
    ("acme/authz", "spiffe://acme-corp.io/client/cli", BILLING, "process_billing"),
]


@pytest.mark.parametrize(("package", "caller", "callee", "action"), CORRECTED)
def test_the_corrections(engine: EmbeddedEngine, package: str, caller: str, callee: str, action: str) -> None:
    assert allows(engine, package, caller, callee, action)


def test_payment_and_inventory_which_the_reference_only_names(engine: EmbeddedEngine) -> None:
    order = {"user_id": "u", "amount": "39.98", "payment_method": "credit_card", "order_id": "o"}
    asked = ("payment/authz", agent("order"), agent("payment"), "process_payment")
    assert allows(engine, *asked, payload=order, via=ORDERED)
    assert not allows(engine, *asked, payload=order, via=ORDERED[:1])
    assert allows(engine, "inventory/authz", agent("order"), agent("inventory"), "reserve_items")
    assert not allows(engine, "inventory/authz", CLI, agent("inventory"), "reserve_items")


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({}, True),
        ({"amount": Decimal("99.99")}, True),
        ({"amount": "999999.99"}, True),
        ({"amount": "1000000"}, False),
        ({"amount": "0"}, False),
        ({"amount": "-5"}, False),
        ({"amount": "much"}, False),
        ({"billing_id": ""}, False),
        ({"billing_id": None}, False),
    ],
)
def test_acmes_outbound_policy(engine: EmbeddedEngine, change: dict[str, Any], *, allowed: bool) -> None:
    asked = ("acme/authz", BILLING, PAYMENT, "process_payment")
    assert allows(engine, *asked, payload=PAID | change) is allowed
    assert not allows(engine, "acme/authz", BILLING, PAYMENT, "refund", payload=PAID)
    assert not allows(
        engine, "acme/authz", BILLING, "spiffe://partner.com/agent/x", "process_payment", payload=PAID
    )


def test_the_partners_inbound_policy(engine: EmbeddedEngine) -> None:
    asked = (BILLING, PAYMENT, "process_payment")
    limits = {"daily_limit": 10000000, "rate_limit_per_minute": 100}
    decision = decide(engine, "partner/authz", *asked, payload=PAID)
    assert decision == {"allow": True, "reason": "partner.authz allows it", "limits": limits}
    for field in ("billing_id", "customer_id", "amount"):
        rest = {key: value for key, value in PAID.items() if key != field}
        assert not allows(engine, "partner/authz", *asked, payload=rest)
    stranger = ("spiffe://stranger.example/agent/billing", PAYMENT, "process_payment")
    refused = decide(engine, "partner/authz", *stranger, payload=PAID)
    assert refused == {"allow": False, "reason": "stranger.example is no registered partner"}


@pytest.mark.parametrize(("domain", "limit"), [("acme-corp.io", 1000000), ("other-partner.io", 500000)])
def test_a_denial_names_the_limit(engine: EmbeddedEngine, domain: str, limit: int) -> None:
    asked = ("partner/authz", f"spiffe://{domain}/agent/billing", PAYMENT, "process_payment")
    assert allows(engine, *asked, payload=PAID | {"amount": str(limit)})
    refused = decide(engine, *asked, payload=PAID | {"amount": str(limit + 1)})
    assert refused == {"allow": False, "reason": f"the amount is above max_transaction {limit} of {domain}"}


def test_allowed_callers_come_from_data(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps({"allowed_callers": {TARGET: [ORCHESTRATOR]}}))
    engine = EmbeddedEngine.from_directory(tmp_path)
    assert allows(engine, "agentweave/authz", ORCHESTRATOR, TARGET, "process_data")
    assert not allows(engine, "agentweave/authz", TARGET, ORCHESTRATOR, "process_data")


def test_business_hours_alone_let_nobody_in(tmp_path: Path) -> None:
    """The FAQ's rule allows everybody between 9 and 17; here the hours narrow who is allowed anyway."""
    data = {"allowed_callers": {TARGET: [ORCHESTRATOR]}, "business_hours": {"from": 9, "to": 17}}
    (tmp_path / "data.json").write_text(json.dumps(data))
    for hour, open_now in ((8, False), (9, True), (17, True), (18, False)):
        engine = EmbeddedEngine(now_ns=lambda hour=hour: hour * 3_600_000_000_000)  # type: ignore[misc]
        engine.load(tmp_path)
        assert allows(engine, "agentweave/authz", ORCHESTRATOR, TARGET, "x") is open_now
        assert not allows(engine, "agentweave/authz", CLI, TARGET, "x")


def test_every_package_that_the_reference_names_is_shipped(engine: EmbeddedEngine) -> None:
    named = {"gateway", "order", "user", "payment", "inventory", "acme", "partner", "company", "agentweave"}
    assert {f"{name}/authz" for name in named} <= engine.packages
    for name in named:
        assert f"package {name}.authz\n" in (SHIPPED / f"{name}_authz.rego").read_text()
