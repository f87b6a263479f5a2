"""Answers that ask for approval: what they may say, what they come to, and grants that say it."""

from __future__ import annotations

from typing import Any

import pytest

from agentweave_bus.authz import ApprovalTerms, Authorizer, AuthzDecision, Grants
from agentweave_bus.authz.approval_terms import read_require_approval
from agentweave_bus.authz.engine import Standing
from agentweave_bus.authz.policy_input import write_input
from agentweave_bus.authz.provider import AuthorizationProvider
from agentweave_bus.authz.wasm import EmbeddedEngine
from agentweave_bus.exceptions import ConfigurationError
from tests.unit.authz.test_authorizer import GATEWAY, ORDER, ScriptedEngine, asking

pytestmark = pytest.mark.anyio

ANNA = "spiffe://agentweave.io/person/anna"
ANYBODY = "spiffe://agentweave.io/person/*"

GRANT = f"""
grants:
  - caller: {GATEWAY}
    callee: {ORDER}
    capabilities: [pay]
    approval: {{by: "{ANYBODY}", above: {{amount: 1000}}, within: 60}}
"""


class TestTerms:
    def test_a_boolean_names_nobody(self) -> None:
        assert read_require_approval(True) == (True, None)
        assert read_require_approval(False) == (False, None)

    def test_an_object_names_who_may_and_until_when(self) -> None:
        required, terms = read_require_approval({"approvers": [ANNA, ANYBODY], "within": 60, "until": 90_000})
        assert required
        assert terms == ApprovalTerms((ANNA, ANYBODY), 60, 90_000)
        assert (terms.until_ms(1_000), terms.until_ms(50_000)) == (61_000, 90_000)

    def test_without_a_time_it_is_a_day(self) -> None:
        assert read_require_approval({"approvers": [ANNA]})[1] == ApprovalTerms((ANNA,), 86_400, None)

    @pytest.mark.parametrize(
        "value",
        [
            None,
            1,
            [],
            {},
            {"within": 60},
            {"approvers": []},
            {"approvers": ANNA},
            {"approvers": [ANNA] * 33},
            {"approvers": ["*"]},
            {"approvers": ["anna"]},
            {"approvers": [7]},
            {"approvers": [ANNA], "within": 0},
            {"approvers": [ANNA], "within": True},
            {"approvers": [ANNA], "within": "60"},
            {"approvers": [ANNA], "within": 2_678_401},
            {"approvers": [ANNA], "within": float("nan")},
            {"approvers": [ANNA], "until": -1},
            {"approvers": [ANNA], "until": 2**53},
            {"approvers": [ANNA], "minimum": 2},
        ],
    )
    async def test_anything_else_is_no_answer(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"."):
            read_require_approval(value)
        decision = await Authorizer(ScriptedEngine({"allow": True, "require_approval": value})).authorize(
            asking(kind="task")
        )
        assert not decision.allowed
        assert not decision.require_approval
        assert "malformed" in decision.reason


class TestDecisions:
    @pytest.mark.parametrize("allow", [True, False])
    async def test_who_may_approve_is_carried_and_nothing_is_allowed(self, allow: bool) -> None:
        answer = {"allow": allow, "reason": "much", "require_approval": {"approvers": [ANNA], "within": 5}}
        decision = await Authorizer(ScriptedEngine(answer)).authorize(asking(kind="task"))
        assert (decision.allowed, decision.require_approval) == (False, True)
        assert decision.approval == ApprovalTerms((ANNA,), 5)
        assert decision.reason == "needs a person's approval: much"

    @pytest.mark.parametrize(
        ("more", "told"),
        [({"kind": "call"}, "submit it as a task"), ({"kind": "task", "direction": "outbound"}, "inbound")],
    )
    async def test_where_nobody_can_be_asked_it_says_what_to_do(
        self, more: dict[str, Any], told: str
    ) -> None:
        engine = ScriptedEngine({"allow": True, "require_approval": {"approvers": [ANNA]}})
        context = asking()
        for name, value in more.items():
            object.__setattr__(context, name, value)
        decision = await Authorizer(engine).authorize(context)
        assert not decision.allowed
        assert told in decision.reason

    async def test_who_says_only_that_it_needs_one_names_nobody(self) -> None:
        engine = ScriptedEngine({"allow": True, "require_approval": True})
        decision = await Authorizer(engine).authorize(asking(kind="task"))
        assert (decision.allowed, decision.require_approval, decision.approval) == (False, True, None)
        assert "names nobody" in decision.reason

    async def test_a_provider_may_ask_for_it_too(self) -> None:
        class Provider(AuthorizationProvider):
            async def authorize(self, context: Any) -> AuthzDecision:
                return AuthzDecision(True, "much", require_approval=True, approval=ApprovalTerms((ANNA,)))

        decision = await Authorizer(Provider()).authorize(asking(kind="task"))
        assert not decision.allowed
        assert decision.approval == ApprovalTerms((ANNA,))

    async def test_what_is_approved_of_leaves_no_standing_answer(self) -> None:
        engine = ScriptedEngine({"allow": True}, standing=Standing(60, "", {}))
        authorizer = Authorizer(engine)
        await authorizer.authorize(asking(kind="task", approval={"by": ANNA}))
        assert not engine.standing_asked
        assert not authorizer.standing_allows(asking(kind="task"))

    def test_the_policy_sees_the_approval_and_nobody_can_add_one(self) -> None:
        seen = asking(approval={"by": ANNA, "at": 7}).to_input()["context"]
        assert seen["approval"] == {"by": ANNA, "at": 7}
        assert "approval" not in asking(extra={"approval": {"by": ANNA}}).to_input()["context"]
        assert "approval" not in asking(approval={"by": ANNA}).standing_input()["context"]


class TestGrants:
    def engine(self, tmp_path: Any) -> EmbeddedEngine:
        (tmp_path / "grants.yaml").write_text(GRANT)
        engine = EmbeddedEngine(cache=tmp_path / "cache")
        engine.load(tmp_path)
        return engine

    async def test_the_shipped_policy_asks_for_it_and_takes_it(self, tmp_path: Any) -> None:
        authorizer = Authorizer(self.engine(tmp_path), grants=Grants.load(tmp_path / "grants.yaml"))
        small = await authorizer.authorize(asking("pay", kind="task", payload={"amount": 1000}))
        assert small.allowed
        large = asking("pay", kind="task", payload={"amount": 1001})
        assert (await authorizer.authorize(large)).approval == ApprovalTerms((ANYBODY,), 60)
        approved = asking("pay", kind="task", payload={"amount": 1001}, approval={"by": ANNA})
        assert (await authorizer.authorize(approved)).allowed
        assert not (await authorizer.authorize(large)).allowed

    async def test_a_standing_answer_never_covers_it(self, tmp_path: Any) -> None:
        question = write_input(asking("pay", kind="task").standing_input())
        assert await self.engine(tmp_path).evaluate_standing("agentweave/grants", question) is None

    def test_whose_tasks_somebody_decides_on(self) -> None:
        grants = Grants.parse(GRANT)
        assert grants.approvals_by(ANNA) == grants.grants
        assert grants.approvals_by(GATEWAY) == ()
        assert grants.to_policy_data()["grants"][0]["approval"] == {
            "by": [ANYBODY],
            "above": {"amount": 1000},
            "within": 60,
        }

    @pytest.mark.parametrize(
        ("old", "new", "told"),
        [
            ("within: 60", "within: 0", "greater than or equal"),
            ("within: 60", "minimum: 2", "unknown key"),
            (f'by: "{ANYBODY}"', 'by: "*"', "by"),
            (f'by: "{ANYBODY}", ', "", "missing"),
            ("amount: 1000", "amount: much", "no number"),
            ("amount: 1000", "a.b: 1", "payload's field"),
        ],
    )
    def test_mistakes_are_named(self, old: str, new: str, told: str) -> None:
        with pytest.raises(ConfigurationError, match=told):
            Grants.parse(GRANT.replace(old, new))

    def test_approval_of_calls_alone_is_warned_of(self) -> None:
        assert not Grants.parse(GRANT).warnings()
        calls = Grants.parse(GRANT + "    kinds: [call]\n")
        assert "nobody is ever asked" in calls.warnings()[0]

    def test_operators_may_approve_and_reject(self) -> None:
        grants = Grants.parse(f"operators: [{{who: {ANNA}, may: [control:approve]}}]")
        assert grants.operator_may(ANNA, "control:approve")
        assert not grants.operator_may(ANNA, "control:reject")
