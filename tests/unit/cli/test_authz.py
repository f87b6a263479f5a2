"""Policies can be tried from the command line, and the answer is the shipped policy's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agentweave_bus.authz.policy_source import find_opa

CLI = "spiffe://shop.test/client/cli"
PAYMENT = "spiffe://shop.test/agent/payment"


def question(action: str = "pay", payload: str = '{"amount": 5}') -> list[str]:
    return ["authz", "check", "--caller", CLI, "--target", PAYMENT, "--action", action, "--payload", payload]


def test_allowed(run: Callable) -> None:
    ran = run(*question())
    assert ran.code == 0
    assert ran.json["allowed"] is True
    assert ran.json["policy"]["chosen_by"] == "agentweave.yaml"


def test_a_broken_limit_is_denied_without_advice_to_grant_what_is_granted(run: Callable) -> None:
    ran = run(*question(payload='{"amount": 101}'))
    assert ran.code == 3
    assert "max_amount" in ran.json["reason"]
    assert ran.json["would_allow"] is None


def test_what_nobody_granted_is_denied_with_the_missing_grant(run: Callable) -> None:
    ran = run(*question(action="refund"))
    assert ran.code == 3
    assert "capabilities: [refund]" in ran.json["would_allow"]


@pytest.mark.usefixtures("terminal")
def test_what_does_not_exist_is_named_and_not_granted(run: Callable, place: Path) -> None:
    with (place / "agentweave.yaml").open("a") as file:
        file.write("agents: [{config: payment.yaml}]\n")
    (place / "payment.yaml").write_text("agent: {name: payment, trust_domain: shop.test, class: 'pay:Pay'}\n")
    (place / "pay.py").write_text(
        "from agentweave_bus import SecureAgent, capability\n\n\nclass Pay(SecureAgent):\n"
        "    @capability('pay')\n    async def pay(self, amount: int) -> dict:\n        return {}\n"
    )
    for asked, said in (
        (question("paye"), f"{PAYMENT} has no capability paye; did you mean pay?"),
        (
            [one.replace("/payment", "/pament") for one in question()],
            "no agent pament; did you mean payment?",
        ),
        ([one.replace("client/cli", "client/clo") for one in question()], "no client clo; did you mean cli?"),
    ):
        ran = run(*asked)
        assert ran.code == 3
        assert said in ran.out
        assert "would allow" not in ran.out


def test_that_grant_would_really_do(run: Callable, place: Path) -> None:
    (place / "more.yaml").write_text(run(*question(action="refund")).json["would_allow"])
    assert run(*question(action="refund"), "--policy", "more.yaml").code == 0


def test_trace_shows_input_grants_and_standing(run: Callable) -> None:
    limited = run(*question(), "--trace").json
    assert limited["input"]["context"]["payload"] == {"amount": 5}
    assert [grant["capabilities"] for grant in limited["matching_grants"]] == [["pay"]]
    assert limited["standing"] is None
    assert run(*question("health", "{}"), "--trace").json["standing"]["cache_seconds"] > 0


@pytest.mark.usefixtures("terminal")
def test_for_people(run: Callable) -> None:
    text = run(*question(action="refund"), "--trace").out
    assert text.startswith("DENIED: no grant")
    assert "this would allow it:" in text
    assert "Grants about this: none" in text
    assert run(*question()).out.startswith("allowed: ")


def test_an_agent_is_asked_for_by_its_own_package(run: Callable, place: Path) -> None:
    (place / "payment.yaml").write_text(
        "agent: {name: payment, trust_domain: shop.test, class: 'a:B'}\n"
        "authorization: {policy_path: nobody/wrote/this}\n"
    )
    with (place / "agentweave.yaml").open("a") as file:
        file.write("agents: [{config: payment.yaml}]\n")
    ran = run(*question())
    assert ran.code == 3
    assert ran.json["policy"]["package"] == "nobody/wrote/this"
    assert run(*question(), "--direction", "outbound").code == 0  # the client's package, not payment's
    assert run(*question(), "--policy-path", "agentweave/grants").code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*question()[:-1], "{"], "--payload is no JSON"),
        ([*question(), "--policy", "nothing.yaml"], "nothing.yaml does not exist"),
        (["authz", "check", "--caller", "me", *question()[4:]], "'me' is no SPIFFE ID"),
    ],
)
def test_mistakes(run: Callable, arguments: list[str], says: str) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert says in ran.err


def test_without_any_policy_there_is_a_way_out(run: Callable, place: Path) -> None:
    (place / "agentweave.yaml").unlink()
    ran = run(*question())
    assert ran.code == 2
    assert "--policy" in ran.err


CASES = f"""
cases:
  - {{name: pays, caller: {CLI}, target: {PAYMENT}, action: pay, payload: {{amount: 5}}, expect: allow}}
  - {{caller: {CLI}, target: {PAYMENT}, action: pay, payload: {{amount: 101}}, expect: deny, reason: max_amount}}
"""


def test_a_table_of_cases(run: Callable, place: Path) -> None:
    (place / "authz-tests.yaml").write_text(CASES)
    ran = run("authz", "test")
    assert ran.code == 0
    assert [case["name"] for case in ran.json["cases"]] == ["pays", "case 2"]


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("expect: allow", "expect: deny", "FAILED pays: expected deny"),
        ("amount: 101", "amount: 99", "FAILED case 2: expected deny"),
        ("reason: max_amount", "reason: weekday", "FAILED case 2: expected a reason with 'weekday'"),
    ],
)
def test_a_case_that_does_not_hold(run: Callable, place: Path, old: str, new: str, says: str) -> None:
    (place / "authz-tests.yaml").write_text(CASES.replace(old, new))
    ran = run("authz", "test")
    assert ran.code == 1
    assert says in ran.out
    assert "1 of 2 cases hold" in ran.out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cases: []", "cases: "),
        ("cases: [{caller: x}]", "cases.0.caller"),
        (CASES.replace("expect: allow", "expect: alow"), "cases.0.expect"),
        (CASES.replace("name: pays", "nam: pays"), "cases.0.nam"),
        ("cases: {", "authz-tests.yaml:1: "),
        ("cases: [{when: 2026-02-30}]", "authz-tests.yaml:1: this can't be read as the timestamp"),
    ],
)
def test_a_malformed_table(run: Callable, place: Path, text: str, says: str) -> None:
    (place / "authz-tests.yaml").write_text(text)
    ran = run("authz", "test")
    assert ran.code == 2
    assert says in ran.err


def test_a_missing_table(run: Callable) -> None:
    ran = run("authz", "test", "none.yaml")
    assert ran.code == 2
    assert "none.yaml can't be read: No such file" in ran.err


@pytest.mark.skipif(find_opa() is None, reason="needs opa")
def test_rego_tests_run_too(run: Callable, place: Path) -> None:
    policies = place / "policies"
    policies.mkdir()
    (policies / "mine.rego").write_text(
        'package mine\n\ndefault allow := false\n\nallow if input.action == "go"\n'
    )
    test = policies / "mine_test.rego"
    test.write_text('package mine_test\n\ntest_go if data.mine.allow with input as {"action": "go"}\n')
    (place / "cases.yaml").write_text(
        f"policy: policies\npolicy_path: mine\n"
        f"cases: [{{caller: {CLI}, target: {PAYMENT}, action: go, expect: allow}}]\n"
    )
    ran = run("authz", "test", "cases.yaml")
    assert (ran.code, ran.json["opa_test"]) == (0, "passed"), ran.err
    test.write_text('package mine_test\n\ntest_go if data.mine.allow with input as {"action": "stop"}\n')
    ran = run("authz", "test", "cases.yaml")
    assert (ran.code, ran.json["opa_test"]) == (1, "failed")
