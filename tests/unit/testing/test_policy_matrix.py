"""Tables of who may do what, decided by the real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.testing import PolicyCase, assert_policy_matrix

POLICIES = Path(__file__).parents[3] / "policies"
PAY = ("agent/order", "agent/payment", "pay")
GRANTS: dict[str, Any] = {
    "grants": [
        {
            "caller": "spiffe://test.local/agent/order",
            "callee": "spiffe://test.local/agent/payment",
            "capabilities": ["pay"],
            "limits": {"max_amount": 10, "max_per_minute": 1},
            "principals": ["https://login.example"],
        }
    ]
}


def test_a_table_that_holds() -> None:
    login = {"iss": "https://login.example", "sub": "ada"}
    assert_policy_matrix(
        GRANTS,
        [
            (*PAY, {"amount": 10}, "allow"),
            (*PAY, {"amount": 10}, "allow"),  # each row by itself: the limit a minute is not used up
            (*PAY, {"amount": 11}, "deny"),
            ("client/cli", "agent/payment", "pay", {"amount": 1}, "deny"),
            ("spiffe://other.test/agent/order", "agent/payment", "pay", {"amount": 1}, "deny"),
            (*PAY, "deny"),  # without the amount that is limited
            PolicyCase(*PAY, "allow", {"amount": 1}, principal=login),
            PolicyCase(*PAY, "deny", {"amount": 1}, principal={**login, "iss": "https://elsewhere"}),
            PolicyCase(*PAY, "deny", {"amount": 1}, kind="event"),
        ],
    )


def test_the_message_is_the_whole_table_with_what_differs_and_why() -> None:
    with pytest.raises(AssertionError) as failed:
        assert_policy_matrix(GRANTS, [(*PAY, {"amount": 10}, "allow"), (*PAY, {"amount": 11}, "allow")])
    first, headings, right, wrong = str(failed.value).splitlines()
    assert first.startswith("1 of 2 decisions of agentweave/grants")
    assert headings.split() == ["caller", "callee", "capability", "payload", "expected", "decided", "reason"]
    assert right.split()[:3] == ["agent/order", "agent/payment", "pay"]
    assert wrong.startswith(">")
    assert '{"amount": 11}  allow     deny' in wrong
    assert "max_amount" in wrong


@pytest.mark.anyio
async def test_it_may_be_called_on_an_event_loop() -> None:
    assert_policy_matrix(GRANTS, [(*PAY, {"amount": 1}, "allow")])
    with pytest.raises(AssertionError):
        assert_policy_matrix(GRANTS, [(*PAY, {"amount": 1}, "deny")])


def test_a_policy_directory_and_a_package_of_its_own() -> None:
    assert_policy_matrix(
        POLICIES,
        [("agent/gateway", "agent/user", "get_user", {"user_id": "u"}, "allow"), (*PAY, "deny")],
        policy_path="user/authz",
        trust_domain="agentweave.io",
    )


def test_a_grants_file(tmp_path: Path) -> None:
    file = tmp_path / "grants.yaml"
    file.write_text("grants: []\n")
    assert_policy_matrix(str(file), [(*PAY, "deny")])


@pytest.mark.parametrize("table", [[], [("a", "b", "c")], [("a", "b", "c", {}, "maybe")]])
def test_what_is_no_table(table: Any) -> None:
    with pytest.raises(AgentWeaveError):
        assert_policy_matrix(GRANTS, table)
