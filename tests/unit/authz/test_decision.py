from __future__ import annotations

import copy
import dataclasses
from decimal import Decimal

import pytest

from agentweave_bus.authz import AuthzContext, AuthzDecision
from agentweave_bus.authz.policy_input import check_standing_input, parse_strict, write_input

CALLER = "spiffe://agentweave.io/agent/gateway"
CALLEE = "spiffe://agentweave.io/agent/order"


def context(**more: object) -> AuthzContext:
    facts: dict[str, object] = {"caller": CALLER, "callee": CALLEE, "action": "get", "direction": "inbound"}
    return AuthzContext(**{**facts, **more})  # type: ignore[arg-type]


class TestDecision:
    def test_both_spellings_are_accepted_and_readable(self) -> None:
        for decision in (AuthzDecision(allowed=True, reason="x"), AuthzDecision(allow=True, reason="x")):
            assert decision.allowed is True
            assert decision.allow is True
            assert (decision.reason, decision.audit_id) == ("x", "")

    def test_the_reference_positional_order(self) -> None:
        decision = AuthzDecision(False, "not_in_allowlist", "id-1")
        assert (decision.allowed, decision.reason, decision.audit_id) == (False, "not_in_allowlist", "id-1")

    @pytest.mark.parametrize(
        "verdict",
        [
            {},
            {"allowed": 1},
            {"allow": "true"},
            {"allowed": True, "allow": False},
            {"allowed": False, "allow": True},
        ],
    )
    def test_anything_but_one_clear_bool_is_refused(self, verdict: dict[str, object]) -> None:
        with pytest.raises(TypeError):
            AuthzDecision(**verdict)  # type: ignore[arg-type]

    def test_audit_id_is_set_by_replacing_and_the_decision_keeps_its_id(self) -> None:
        decision = AuthzDecision(allow=True, limits={"max_per_minute": 3}, revision="r", standing=True)
        written = dataclasses.replace(decision, audit_id="chain-7")
        assert written.audit_id == "chain-7"
        assert (written.allowed, written.limits, written.revision) == (True, {"max_per_minute": 3}, "r")
        assert (written.standing, written.decision_id) == (True, decision.decision_id)

    def test_each_decision_has_its_own_id(self) -> None:
        assert AuthzDecision(allow=True).decision_id != AuthzDecision(allow=True).decision_id

    def test_it_is_frozen_and_no_truth_value(self) -> None:
        decision = AuthzDecision(allow=False)
        with pytest.raises(dataclasses.FrozenInstanceError):
            decision.allowed = True  # type: ignore[misc]
        with pytest.raises(TypeError, match=r"\.allowed"):
            bool(decision)


class TestContext:
    def test_it_is_frozen_and_can_be_replaced_and_copied(self) -> None:
        asked = context(payload={"a": 1})
        for name in ("action", "further"):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(asked, name, "x")
        assert copy.deepcopy(asked) == dataclasses.replace(asked) == asked
        assert dataclasses.replace(asked, action="put") == context(payload={"a": 1}, action="put") != asked

    def test_input_has_the_shape_that_policies_read(self) -> None:
        link = {"iss": CALLEE, "aud": CALLER, "cap": "route", "kind": "task", "sender_expired": True}
        asked = context(
            payload={"amount": Decimal("12.50")},
            task_id="t-1",
            kind="task",
            transport="a2a",
            via=[link],
            principal={"iss": "https://login.example", "sub": "anna"},
            scope=["spiffe://agentweave.io/agent/order#get"],
            evidence="tls",
            stored_at=7,
            sender_expired=True,
            reissued_by="spiffe://agentweave.io/agentweave/control",
            extra={"window": "night"},
        )
        assert asked.to_input() == {
            "caller_spiffe_id": CALLER,
            "callee_spiffe_id": CALLEE,
            "action": "get",
            "direction": "inbound",
            "context": {
                "payload": {"amount": Decimal("12.50")},
                "task_id": "t-1",
                "kind": "task",
                "transport": "a2a",
                "caller_trust_domain": "agentweave.io",
                "via": [link],
                "principal": {"iss": "https://login.example", "sub": "anna"},
                "scope": ["spiffe://agentweave.io/agent/order#get"],
                "evidence": "tls",
                "stored_at": 7,
                "sender_expired": True,
                "reissued_by": "spiffe://agentweave.io/agentweave/control",
                "window": "night",
            },
        }

    def test_unknown_facts_are_left_out_not_null(self) -> None:
        found = context().to_input()["context"]
        assert not {"principal", "scope", "stored_at", "reissued_by"} & found.keys()
        assert found["via"] == []
        assert found["payload"] is None

    def test_further_facts_cannot_pose_as_verified_ones(self) -> None:
        forged = {
            "principal": {"iss": "x"},
            "scope": [],
            "stored_at": 1,
            "caller_trust_domain": "evil",
            "via": [{}],
        }
        assert context(extra=forged).to_input() == context().to_input()

    def test_standing_input_holds_only_what_a_standing_answer_may_depend_on(self) -> None:
        link = {"iss": CALLEE, "aud": CALLER, "cap": "route", "kind": "task", "id": "x", "iat": 1}
        reduced = context(
            payload={"a": 1}, task_id="t", via=[link], stored_at=1, extra={"a": 1}, evidence="tls"
        ).standing_input()
        check_standing_input(reduced)
        assert reduced["context"]["via"] == [{"iss": CALLEE, "aud": CALLER, "cap": "route", "kind": "task"}]
        assert reduced["context"].keys() == {"kind", "transport", "caller_trust_domain", "via"}

    def test_a_decimal_reaches_the_policy_as_a_number_with_all_its_digits(self) -> None:
        raw = write_input(context(payload={"amount": Decimal("0.1000000000000000000000001")}).to_input())
        assert b'"amount":0.1000000000000000000000001' in raw
        assert parse_strict(raw)["context"]["payload"]["amount"] == Decimal("0.1000000000000000000000001")

    def test_origin_and_trust_domain(self) -> None:
        assert context().origin is None
        assert (
            context(via=[{"iss": "spiffe://a.io/x"}, {"iss": "spiffe://a.io/y"}]).origin == "spiffe://a.io/x"
        )
        assert context(caller="no id").caller_trust_domain == ""
        assert context(caller="x spiffe://a.io/y").caller_trust_domain == ""
