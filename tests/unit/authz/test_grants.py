from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from agentweave_bus.authz import Grants
from agentweave_bus.exceptions import ConfigurationError

if TYPE_CHECKING:
    from pathlib import Path

GATEWAY = "spiffe://agentweave.io/agent/gateway"
ORDER = "spiffe://agentweave.io/agent/order"
PAYMENT = "spiffe://agentweave.io/agent/payment"
CLI = "spiffe://agentweave.io/client/cli"

SHOP = f"""
grants:
  - caller: {GATEWAY}
    callee: {ORDER}
    capabilities: [create_order, get_order]
    principals: ["https://login.example"]
  - caller: [{ORDER}, "spiffe://agentweave.io/client/*"]
    callee: [{PAYMENT}]
    capabilities: ["*"]
    kinds: [call]
    limits: {{max_amount: 1000, min_amount: 0.5, max_per_minute: 60}}
    on_behalf_of: ["spiffe://agentweave.io/agent/*"]
  - caller: {GATEWAY}
    callee: {ORDER}
    capabilities: order.created
    kinds: event
partners:
  other.example: {{max_transaction: 1000, rate_limit_per_minute: 60, daily_limit: 10000}}
operators:
  - who: {CLI}
    may: [control:cancel, control:watch]
"""


@pytest.fixture
def shop() -> Grants:
    return Grants.parse(SHOP)


class TestFind:
    def test_what_is_granted_is_found(self, shop: Grants) -> None:
        assert shop.find(GATEWAY, ORDER, "create_order", "call") is shop.grants[0]
        assert shop.find(GATEWAY, ORDER, "get_order", "task") is shop.grants[0]
        assert shop.find(CLI, PAYMENT, "whatever", "call") is shop.grants[1]
        assert shop.find(GATEWAY, ORDER, "order.created", "event") is shop.grants[2]

    @pytest.mark.parametrize(
        ("caller", "callee", "capability", "kind"),
        [
            (ORDER, ORDER, "create_order", "call"),
            (GATEWAY, PAYMENT, "create_order", "call"),
            (GATEWAY, ORDER, "delete_order", "call"),
            (GATEWAY, ORDER, "create_order", "event"),
            (CLI, PAYMENT, "x", "task"),
            ("spiffe://agentweave.io/client", PAYMENT, "x", "call"),
            ("spiffe://agentweave.io/client/", PAYMENT, "x", "call"),
            ("spiffe://agentweave.io/clients/cli", PAYMENT, "x", "call"),
            (CLI, PAYMENT, "control:cancel", "call"),
        ],
    )
    def test_nothing_else_is(
        self, shop: Grants, caller: str, callee: str, capability: str, kind: str
    ) -> None:
        assert shop.find(caller, callee, capability, kind) is None

    def test_a_prefix_covers_every_depth(self, shop: Grants) -> None:
        assert shop.find("spiffe://agentweave.io/client/eu/north/cli", PAYMENT, "x")

    def test_no_grants_allow_nothing(self) -> None:
        assert Grants().find(GATEWAY, ORDER, "create_order") is None
        assert Grants().permits(GATEWAY, ORDER, "create_order") is False

    def test_permits_looks_at_origin_and_principal(self, shop: Grants) -> None:
        assert shop.permits(GATEWAY, ORDER, "get_order")
        assert shop.permits(GATEWAY, ORDER, "get_order", principal_issuer="https://login.example")
        assert not shop.permits(GATEWAY, ORDER, "get_order", principal_issuer="https://other.example")
        assert shop.permits(ORDER, PAYMENT, "pay", origin=GATEWAY)
        assert not shop.permits(ORDER, PAYMENT, "pay", origin=CLI)
        assert not shop.permits(ORDER, PAYMENT, "pay")
        assert not shop.permits(
            ORDER, PAYMENT, "pay", origin=GATEWAY, principal_issuer="https://login.example"
        )

    def test_any_issuer(self) -> None:
        text = f"grants: [{{caller: {GATEWAY}, callee: {ORDER}, capabilities: a, principals: ['*']}}]"
        assert Grants.parse(text).permits(GATEWAY, ORDER, "a", principal_issuer="anything")

    def test_operators_acts(self, shop: Grants) -> None:
        assert shop.permits(CLI, ORDER, "control:cancel")
        assert not shop.permits(CLI, ORDER, "control:revoke")
        assert not shop.permits(GATEWAY, ORDER, "control:cancel")

    def test_who_reaches_whom(self, shop: Grants) -> None:
        assert [(reach.agent, reach.capabilities, reach.kinds) for reach in shop.callees_of(GATEWAY)] == [
            (ORDER, ("create_order", "get_order"), ("call", "task")),
            (ORDER, ("order.created",), ("event",)),
        ]
        assert [reach.agent for reach in shop.callees_of(CLI)] == [PAYMENT]
        assert [reach.agent for reach in shop.callers_of(PAYMENT)] == [
            ORDER,
            "spiffe://agentweave.io/client/*",
        ]
        assert shop.callers_of(GATEWAY) == ()
        assert shop.identities() == {GATEWAY, ORDER, PAYMENT, CLI}


class TestExplain:
    @pytest.mark.parametrize(
        ("capability", "kind"),
        [("refund", "call"), ("refund", "task"), ("order.paid", "event"), ("control:drain", "control")],
    )
    def test_the_snippet_would_allow_it(self, shop: Grants, capability: str, kind: str) -> None:
        assert not shop.permits(CLI, ORDER, capability, kind)
        snippet = shop.explain(CLI, ORDER, capability, kind)
        assert Grants.parse(snippet).permits(CLI, ORDER, capability, kind)
        assert not Grants.parse(snippet).permits(GATEWAY, ORDER, capability, kind)


class TestWarnings:
    def test_a_good_file_has_none(self, shop: Grants) -> None:
        assert shop.warnings() == ()

    def test_what_never_matches_is_named(self) -> None:
        entry = f"{{caller: {GATEWAY}, callee: {ORDER}, capabilities: [get, order.created]}}"
        found = Grants.parse(f"grants: [{entry}, {entry}]").warnings()
        assert any("grants[0]" in line and "order.created" in line for line in found)
        assert "grants[1] repeats grants[0]" in found

    def test_a_capability_that_the_callee_lacks_is_named_where_it_is_known(self, shop: Grants) -> None:
        known = {ORDER: ["create_orders", "get_order"], PAYMENT: ["pay"]}
        assert shop.warnings(known) == (
            f"grants[0]: {ORDER} has no capability 'create_order'; did you mean 'create_orders'?",
        )
        assert shop.warnings({ORDER: ["create_order", "get_order"]}) == ()

    def test_a_pattern_that_covers_the_callee_itself_is_named(self) -> None:
        everyone = "spiffe://agentweave.io/agent/*"
        entry = f"{{caller: {everyone}, callee: {ORDER}, capabilities: [get]}}"
        (found,) = Grants.parse(f"grants: [{entry}]").warnings()
        assert found.startswith(f"grants[0]: the caller '{everyone}' covers {ORDER} itself")
        said = f"{{caller: [{everyone}, {ORDER}], callee: {ORDER}, capabilities: [get]}}"
        assert Grants.parse(f"grants: [{said}]").warnings() == ()

    def test_an_empty_file_is_worth_a_warning(self) -> None:
        assert len(Grants.parse("").warnings()) == 1


class TestPolicyData:
    def test_rego_gets_lists_and_defaults(self, shop: Grants) -> None:
        data = shop.to_policy_data()
        assert data["grants"][0] == {
            "caller": [GATEWAY],
            "callee": [ORDER],
            "capabilities": ["create_order", "get_order"],
            "kinds": ["call", "task"],
            "limits": {},
            "principals": ["https://login.example"],
        }
        assert data["grants"][1]["limits"] == {"max_amount": 1000, "min_amount": 0.5, "max_per_minute": 60}
        assert type(data["grants"][1]["limits"]["max_amount"]) is int
        assert data["operators"] == [{"who": [CLI], "may": ["control:cancel", "control:watch"]}]
        assert data["partner"] == {
            "registered_domains": ["other.example"],
            "partner_limits": {
                "other.example": {"max_transaction": 1000, "rate_limit_per_minute": 60, "daily_limit": 10000}
            },
        }

    def test_all_acts_are_written_out(self) -> None:
        data = Grants.parse(f"operators: [{{who: {CLI}, may: control:*}}]").to_policy_data()
        assert "control:revoke" in data["operators"][0]["may"]
        assert "control:*" not in data["operators"][0]["may"]


def refusal(text: str) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        Grants.parse(text)
    return caught.value


class TestMistakes:
    def test_an_unknown_key_names_line_place_and_the_nearest(self) -> None:
        error = refusal(SHOP.replace("    limits:", "    limts:"))
        assert str(error) == "grants.yaml:11: grants[1].limts: unknown key; did you mean 'limits'?"
        assert error.key == "grants[1].limts"

    def test_a_key_unlike_any_lists_the_known_ones(self) -> None:
        assert "known here: approval, callee, caller, capabilities" in str(
            refusal(SHOP.replace("    limits:", "    zzz:"))
        )

    def test_a_partners_key(self) -> None:
        error = refusal(SHOP.replace("daily_limit", "dayly_limit"))
        assert (
            str(error)
            == "grants.yaml:18: partners.other.example.dayly_limit: unknown key; did you mean 'daily_limit'?"
        )

    def test_every_mistake_is_told(self) -> None:
        text = str(
            refusal(SHOP.replace("kinds: [call]", "kinds: [cal]").replace("max_amount: 1000", "amount: 1"))
        )
        assert "grants.yaml:10: grants[1].kinds[0]" in text
        assert "grants.yaml:11: grants[1].limits: 'amount' is no limit" in text

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            (f"callee: {ORDER}", "callee: spiffe://agentweave.io/agent/*", "named exactly"),
            (f"callee: {ORDER}", "callee: order", "must start with 'spiffe://'"),
            (f"caller: {GATEWAY}", "caller: 'spiffe://agentweave.io/agent/g*'", "g*"),
            (f"caller: {GATEWAY}", "caller: '*'", "spiffe://"),
            (f"caller: {GATEWAY}", "caller: []", "at least one"),
            (f"caller: {GATEWAY}", "caller: 7", "write text"),
            (f"caller: {GATEWAY}", "nothing: 7", "grants[0].caller: this key is missing"),
            ("create_order, get", "Create Order, get", "is no capability"),
            ("create_order, get", "'control:cancel', get", "is no capability"),
            ("max_amount: 1000", "max_amount: .inf", "is no number"),
            ("max_amount: 1000", "max_amount: .nan", "is no number"),
            ("max_amount: 1000", "max_amount: true", "is no number"),
            ("max_amount: 1000", "max_amount: '1000'", "without quotes"),
            ("max_amount: 1000", "max_amount: 0.1", "nothing could ever pass"),
            ("max_per_minute: 60", "max_per_minute: 0", "whole number"),
            ("max_per_minute: 60", "max_per_minute: 1.5", "whole number"),
            ("rate_limit_per_minute: 60", "rate_limit_per_minute: 0", "greater than or equal to 1"),
            ("other.example:", "Other.Example:", "no trust domain"),
            ("control:cancel", "control:cancle", "no operator's act"),
            ("grants:\n", "grants: 3\nx:\n", "write a list here"),
            ("partners:", "grants: []\npartners:", "'grants' is written twice"),
            (
                "    kinds: [call]",
                "    kinds: [call]\n    kinds: [task]",
                "11: the key 'kinds' is written twice",
            ),
            ("    kinds: [call]", "    kinds: [call", "not valid YAML"),
            ("    kinds: [call]", "    kinds: !!python/tuple [call]", "is not allowed"),
            ("grants:\n", "note: 2026-02-30\ngrants:\n", "can't be read as the timestamp"),
            ("grants:\n", "note: 0b_\ngrants:\n", "can't be read as the int"),
            ("grants:\n", "note: !!bool x\ngrants:\n", "can't be read as the bool"),
            ("grants:\n", "note: !!timestamp x\ngrants:\n", "can't be read as the timestamp"),
            ("grants:\n", "note: !!int ''\ngrants:\n", "can't be read as the int"),
            ("grants:\n", "? [a]\n: b\ngrants:\n", "a key must be a word"),
        ],
    )
    def test_each_mistake_is_refused_with_its_reason(self, old: str, new: str, said: str) -> None:
        assert old in SHOP
        assert said in str(refusal(SHOP.replace(old, new, 1)))

    @pytest.mark.parametrize(
        "text",
        [
            "m0: &m0 {k: v}\n"
            + "".join(f"m{n}: &m{n}\n  <<: [{', '.join([f'*m{n - 1}'] * 9)}]\n" for n in range(1, 9)),
            f"grants:\n- &g {{caller: {GATEWAY}, callee: {ORDER}, capabilities: [{'go, ' * 2_000}]}}\n"
            + "- *g\n" * 3_000,
        ],
        ids=["merges", "aliases"],
    )
    def test_what_a_small_file_stands_for_is_bounded(self, text: str) -> None:
        before = time.process_time()
        error = refusal(text)
        assert "merge keys" in str(error) or "too many values" in str(error)
        assert time.process_time() - before < 10  # it was minutes, or gigabytes

    def test_aliases_are_values(self) -> None:
        text = f"grants: [{{caller: &me {GATEWAY}, callee: {ORDER}, capabilities: [go]}}]\n"
        both = text + "operators: [{who: *me, may: [control:cancel]}]\n"
        assert Grants.parse(both).operators[0].who == (GATEWAY,)

    def test_files(self, tmp_path: Path) -> None:
        path = tmp_path / "grants.yaml"
        with pytest.raises(ConfigurationError, match="No such file"):
            Grants.load(path)
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigurationError, match="not UTF-8"):
            Grants.load(path)
        path.write_text(SHOP.replace("limits", "limts"))
        with pytest.raises(ConfigurationError, match=rf"{path}:11: "):
            Grants.load(path)
        path.write_text(SHOP)
        assert Grants.load(path) == Grants.parse(SHOP)
