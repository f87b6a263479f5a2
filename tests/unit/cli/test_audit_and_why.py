"""Logs can be verified, shown and asked why, with records that the real log wrote."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentweave_bus.agent.failures import correlation_id
from agentweave_bus.authz import AuditLog, AuthzContext, AuthzDecision
from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.bus.records import decision_facts

CLI = "spiffe://shop.test/client/cli"
PAYMENT = "spiffe://shop.test/agent/payment"
DIGEST = "ab" * 32
ENVELOPE = {"digest": DIGEST, "id": "task-1", "kind": "call", "iss": CLI, "aud": PAYMENT, "cap": "pay"}


@contextmanager
def log(place: Path, name: str) -> Iterator[AuditLog]:
    written = AuditLog(place / ".agentweave" / "audit" / f"{name}.jsonl", name)
    try:
        yield written
    finally:
        written.close()


def decided(action: str = "pay", *, allowed: bool, revision: str = "r1", **more: Any) -> dict[str, Any]:
    direction = more.pop("direction", "inbound")
    asked = {"payload": {"amount": 500}, "caller": CLI, **more.pop("asked", {})}
    context = AuthzContext(callee=PAYMENT, action=action, direction=direction, **asked)
    decision = AuthzDecision(allowed=allowed, reason="because", revision=revision)
    return {**decision_facts(context, decision), **more}


def refusal(step: int, name: str, **more: Any) -> dict[str, Any]:
    return {"event": "refusal", "step": step, "step_name": name, "reason": "because", **more}


def sent(place: Path) -> None:
    with log(place, "cli") as mine:
        mine.append({"event": "call", **ENVELOPE, **decided(allowed=True, direction="outbound")})


def answered(place: Path, *records: dict[str, Any]) -> str:
    """Write what payment's log says; return the audit id of the first record."""
    with log(place, "payment") as theirs:
        first, *_ = [theirs.append(record).audit_id for record in records]
    return first


def test_denied_by_the_caller_s_own_policy(run: Callable, place: Path) -> None:
    with log(place, "cli") as mine:
        entry = mine.append(refusal(0, "outbound", **decided("refund", allowed=False, direction="outbound")))
    story = run("why", entry.audit_id).json
    assert story["verdict"] == "denied"
    assert "caller's side" in story["layer"]
    assert (story["rule"], story["revision"], story["audit_id"]) == ("because", "r1", entry.audit_id)
    assert "capabilities: [refund]" in story["would_allow"]
    assert "--capability refund" in story["try_again"]


def test_the_advice_on_trying_again_works(run: Callable, place: Path) -> None:
    entry = answered(place, refusal(11, "authorization", **ENVELOPE, **decided(allowed=False)))
    command = shlex.split(run("why", entry).json["try_the_policy"])
    ran = run(*command[1:])
    assert ran.code == 3
    assert "max_amount" in ran.json["reason"]


def test_denied_by_the_callee_s_policy_over_a_limit(run: Callable, place: Path) -> None:
    sent(place)
    entry = answered(place, refusal(11, "authorization", **ENVELOPE, **decided(allowed=False)))
    story = run("why", entry).json
    assert story["layer"] == f"the policy of {PAYMENT}, before anything ran"
    assert [grant["limits"] for grant in story["matching_grants"]] == [{"max_amount": 100}]
    assert "would_allow" not in story
    assert [record["event"] for record in story["records"]] == ["call", "refusal"]


def why_denied(run: Callable, place: Path, action: str = "pay", **asked: Any) -> Any:
    record = refusal(11, "authorization", **ENVELOPE, **decided(action, allowed=False, asked=asked))
    return run("why", answered(place, record)).json


ADA = {"iss": "https://login.example", "sub": "ada"}
WEB = "spiffe://shop.test/client/web"


def test_its_commands_ask_what_was_asked(run: Callable, place: Path) -> None:
    story = why_denied(run, place, principal=ADA, kind="task")
    assert parsed(story["try_the_policy"], "--principal") == ADA
    assert "--kind task" in story["try_the_policy"]
    assert "try_again" not in story  # `call` makes calls, no tasks
    story = why_denied(run, place, principal=ADA, scope=[f"{PAYMENT}#pay"])
    assert parsed(story["try_again"], "--principal") == ADA
    assert f"--scope '{PAYMENT}#pay'" in story["try_again"]
    assert story["not_carried"] == ["scope"]  # by `authz check`
    via = [{"iss": WEB, "aud": CLI, "cap": "shop"}]
    story = why_denied(run, place, via=via)
    assert parsed(story["try_the_policy"], "--via") == via
    assert "try_again" not in story
    assert "max_amount" in run(*shlex.split(story["try_the_policy"])[1:]).json["reason"]


def parsed(command: str, option: str) -> Any:
    words = shlex.split(command)
    return json.loads(words[words.index(option) + 1])


def test_call_again_is_for_clients_of_this_stack(run: Callable, place: Path) -> None:
    assert "try_again" not in why_denied(run, place, caller="spiffe://shop.test/agent/order")
    assert "try_again" not in why_denied(run, place, caller=WEB)
    with (place / "agentweave.yaml").open("a") as file:
        file.write("clients: [cli, web]\n")
    assert why_denied(run, place, caller=WEB)["try_again"].endswith(" --as web")


def test_an_operator_s_act_is_done_by_its_commands_and_is_nothing_to_call(run: Callable, place: Path) -> None:
    with (place / "agentweave.yaml").open("a") as file:
        file.write("clients: [cli, operator]\n")
    story = why_denied(run, place, "control:redrive")
    assert "try_again" not in story
    assert "agentweave dlq list" in story["operators_commands"]
    assert "control:redrive" in story["would_allow"]
    assert "may_already" not in story  # nobody may yet
    with (place / "grants.yaml").open("a") as file:
        file.write("operators:\n  - {who: spiffe://shop.test/client/operator, may: [control:redrive]}\n")
    assert why_denied(run, place, "control:redrive")["may_already"] == ["operator"]
    assert "may_already" not in why_denied(run, place, "control:cancel")


@pytest.mark.usefixtures("terminal")
def test_who_may_do_an_operator_s_act_is_told_people(run: Callable, place: Path) -> None:
    (place / "agentweave.yaml").write_text(
        "trust_domain: shop.test\ngrants: grants.yaml\nclients: [cli, operator]\n"
    )
    with (place / "grants.yaml").open("a") as file:
        file.write("operators:\n  - {who: spiffe://shop.test/client/operator, may: ['control:*']}\n")
    record = refusal(11, "authorization", **ENVELOPE, **decided("control:redrive", allowed=False))
    text = run("why", answered(place, record)).out
    assert "done by `agentweave dlq list`, `dlq show`, `dlq redrive`, `dlq drop`." in text
    assert "as another client: --as operator." in text
    assert "agentweave call" not in text


def test_an_issuer_or_origin_that_no_grant_lists(run: Callable, place: Path) -> None:
    story = why_denied(run, place, principal=ADA)
    assert story["add_to_a_grant"] == ['principals: ["https://login.example"]']
    story = why_denied(run, place, "refund", principal=ADA)
    (entry,) = yaml.safe_load(story["would_allow"])["grants"]
    assert entry["principals"] == ["https://login.example"]
    grants = (place / "grants.yaml").read_text()
    (place / "grants.yaml").write_text(
        grants.replace("    limits:", "    on_behalf_of: [spiffe://a.b/c]\n    limits:")
    )
    story = why_denied(run, place, via=[{"iss": WEB, "aud": CLI, "cap": "shop"}])
    assert story["add_to_a_grant"] == [f'on_behalf_of: ["{WEB}"]']


def test_what_the_grants_allow_and_another_package_denies(run: Callable, place: Path) -> None:
    (place / "agentweave.yaml").write_text(
        "trust_domain: shop.test\ngrants: grants.yaml\nagents: [{config: p.yaml}]\n"
    )
    (place / "p.yaml").write_text(
        "agent: {name: payment, trust_domain: shop.test, class: 'a:B'}\n"
        "authorization: {policy_path: shop/payment}\n"
    )
    story = why_denied(run, place, payload={"amount": 5})
    assert story["denied_by_package"] == "shop/payment"
    assert "--policy-path shop/payment" in story["try_the_policy"]
    (place / "p.yaml").unlink()
    story = why_denied(run, place, payload={"amount": 5})
    assert story["allowed_now"]
    assert "denied_by_package" not in why_denied(run, place)  # over the limit: the grants deny, too


MILL = """package mill.authz

import rego.v1

default allow := false

allow if {
	data.agentweave.grants.allow
	input.context.payload.amount < 50
}
"""


@pytest.mark.usefixtures("terminal")
@pytest.mark.skipif(find_opa() is None, reason="needs opa")
def test_an_own_package_is_asked_again(run: Callable, place: Path) -> None:
    """What is blamed is what denies it now: nobody, the package, or the grants behind it."""
    (place / "mill").mkdir()
    (place / "mill" / "mill.rego").write_text(MILL)
    (place / "grants.yaml").rename(place / "mill" / "grants.yaml")
    asks = ("--policy", "mill", "--policy-path", "mill/authz")
    texts = {}
    for amount in (5, 70, 500):
        record = refusal(11, "authorization", **ENVELOPE, **decided(allowed=False, asked=paid(amount)))
        texts[amount] = run("why", answered(place, record), *asks).out
    assert "The policy as it is now allows this: it changed since (revision r1 then, " in texts[5]
    assert "denies it" not in texts[5]
    assert "The grants allow this; the package mill/authz denies it." in texts[70]
    assert "mill/authz denies it, and so do the grants: grant 1 " in texts[500]
    assert "max_amount" in texts[500]


def paid(amount: int) -> dict[str, Any]:
    return {"payload": {"amount": amount}}


@pytest.mark.usefixtures("terminal")
def test_what_the_same_policy_allows_now(run: Callable, place: Path) -> None:
    checked = ["--caller", CLI, "--target", PAYMENT, "--action", "pay", "--payload", '{"amount": 5}']
    revision = run("authz", "check", *checked, "--json").json["policy"]["revision"]
    facts = decided(allowed=False, revision=revision, asked=paid(5))
    text = run("why", answered(place, refusal(11, "authorization", **ENVELOPE, **facts))).out
    assert "The same policy allows this now: a limit over time was used up." in text


def add_agent(place: Path, name: str) -> None:
    """Give the stack an agent whose class has the capabilities ``pay`` and ``health``."""
    (place / "agentweave.yaml").write_text(
        "trust_domain: shop.test\ngrants: grants.yaml\nagents: [{config: p.yaml}]\n"
    )
    (place / "p.yaml").write_text(f"agent: {{name: {name}, trust_domain: shop.test, class: 'pay:Pay'}}\n")
    (place / "pay.py").write_text(
        "from agentweave_bus import SecureAgent, capability\n\n\nclass Pay(SecureAgent):\n"
        "    @capability('pay')\n    async def pay(self, amount: int) -> dict:\n        return {}\n"
    )


def test_nobody_is_advised_to_grant_what_does_not_exist(run: Callable, place: Path) -> None:
    add_agent(place, "payment")
    story = why_denied(run, place, "paye")
    assert story["no_such_capability"] == f"{PAYMENT} has no capability paye; did you mean pay?"
    assert not {"would_allow", "try_again"} & set(story)


def test_an_agent_that_the_stack_does_not_have(run: Callable, place: Path) -> None:
    (place / "agentweave.yaml").write_text("trust_domain: shop.test\nagents: [{config: p.yaml}]\n")
    (place / "p.yaml").write_text("agent: {name: payments, trust_domain: shop.test, class: 'a:B'}\n")
    story = why_denied(run, place)
    assert story["no_such_agent"].endswith("has no agent payment; did you mean payments?")
    assert "would_allow" not in story
    (place / "p.yaml").write_text("agent: {name: payment, trust_domain: shop.test, class: 'a:B'}\n")
    assert "no_such_agent" not in why_denied(run, place)


def test_a_correlation_id_is_a_failure_s(run: Callable, place: Path) -> None:
    sent(place)
    ran = run("why", correlation_id())
    assert ran.code == 2
    assert "its handler failed" in ran.err
    assert "in the log of the agent that was called" in ran.err


def test_refused_by_the_code_s_own_restriction(run: Callable, place: Path) -> None:
    entry = answered(place, refusal(11, "authorization", **ENVELOPE, **decided(allowed=False, revision="")))
    story = run("why", entry).json
    assert "@requires_peer" in story["layer"]
    assert "would_allow" not in story  # no grant would help


def test_refused_before_any_policy_was_asked(run: Callable, place: Path) -> None:
    entry = answered(place, refusal(4, "proof"))
    story = run("why", entry).json
    assert story["verdict"] == "refused"
    assert story["layer"].startswith("admission step 4 (proof) of payment")


@pytest.mark.parametrize("wanted", ["task-1", DIGEST, DIGEST[:8]])
def test_a_call_is_found_by_task_and_digest(run: Callable, place: Path, wanted: str) -> None:
    sent(place)
    answered(
        place,
        {"event": "admission", **ENVELOPE, **decided(allowed=True)},
        {"event": "outcome", "digest": DIGEST, "status": "completed", "ms": 3.5},
    )
    story = run("why", wanted).json
    assert story["verdict"] == "ran"
    assert "completed after 3.5 ms" in story["sentence"]
    assert [record["event"] for record in story["records"]] == ["call", "admission", "outcome"]


@pytest.mark.usefixtures("terminal")
def test_a_failed_handler_whose_own_call_was_denied(run: Callable, place: Path) -> None:
    links = [{"iss": CLI, "aud": PAYMENT, "cap": "pay", "id": "task-1"}]
    ended = {"event": "outcome", "digest": DIGEST, "status": "failed", "ms": 4.88}
    asked = {"caller": PAYMENT, "via": links}
    inner = refusal(0, "outbound", **decided("refund", allowed=False, direction="outbound", asked=asked))
    other = inner | {"input": {"context": {"via": [{"id": "task-2"}]}}}
    with log(place, "payment") as theirs:
        theirs.append({"event": "admission", **ENVELOPE, **decided(allowed=True)})
        denied = theirs.append(inner).audit_id
        theirs.append(other)
        theirs.append(ended)
    text = run("why", "task-1").out
    assert f"a call of it to {PAYMENT} was refused: because.\n  agentweave why {denied}\n" in text
    assert text.partition("Of the calls made while it ran:\n")[2].count("REFUSED") == 1
    nested = run("why", "task-1", "--json").json["nested"]
    assert [record["audit_id"] for record in nested] == [denied]


def test_a_nested_call_s_outcome_is_told(run: Callable, place: Path) -> None:
    links = [{"iss": CLI, "aud": PAYMENT, "cap": "pay", "id": "task-1"}]
    inner = ENVELOPE | {"digest": "cd" * 32, "id": "task-9"}
    sent(place)
    answered(
        place,
        {"event": "admission", **inner, **decided(allowed=True, asked={"via": links})},
        {"event": "outcome", "digest": "cd" * 32, "status": "completed", "ms": 1.0},
    )
    nested = run("why", "task-1").json["nested"]
    assert [record["event"] for record in nested] == ["admission", "outcome"]


def test_a_call_that_never_ended(run: Callable, place: Path) -> None:
    answered(place, {"event": "admission", **ENVELOPE, **decided(allowed=True)})
    assert run("why", "task-1").json["verdict"] == "admitted"


def test_a_call_that_nobody_received(run: Callable, place: Path) -> None:
    sent(place)
    story = run("why", "task-1").json
    assert story["verdict"] == "sent"
    assert "--audit" in story["sentence"]


def test_an_id_that_is_nowhere(run: Callable, place: Path) -> None:
    sent(place)
    for wanted in ("nothing", DIGEST[:7]):
        ran = run("why", wanted)
        assert ran.code == 2
        assert f"No record here is about '{wanted}'" in ran.err


@pytest.mark.parametrize("command", [["why", "x"], ["audit", "verify"], ["audit", "tail"]])
def test_without_logs(run: Callable, command: list[str]) -> None:
    ran = run(*command)
    assert ran.code == 2
    assert "There are no audit logs at .agentweave/audit" in ran.err


@pytest.mark.usefixtures("terminal")
def test_why_for_people(run: Callable, place: Path) -> None:
    sent(place)
    entry = answered(place, refusal(11, "authorization", **ENVELOPE, **decided("refund", allowed=False)))
    text = run("why", entry).out
    assert text.startswith(f"It was refused by the policy of {PAYMENT}")
    assert "would allow it:\n  grants:" in text
    assert f"REFUSED   {CLI} -> {PAYMENT} refund at authorization: because" in text


def test_verify_finds_nothing_wrong_then_what_was_changed(run: Callable, place: Path) -> None:
    sent(place)
    ran = run("audit", "verify")
    assert (ran.code, ran.json["ok"], ran.json["records"]) == (0, True, 3)
    (file,) = (place / ".agentweave" / "audit").glob("*.jsonl")
    file.write_text(file.read_text().replace("because", "whatever"))
    ran = run("audit", "verify", str(file))
    assert ran.code == 1
    assert ran.json["problems"][0]["kind"] == "changed"


@pytest.mark.usefixtures("terminal")
def test_verify_for_people(run: Callable, place: Path) -> None:
    sent(place)
    text = run("audit", "verify").out
    assert text.startswith("3 records in 1 chain: nothing wrong was found\nWhat this can't show:")


@pytest.mark.usefixtures("terminal")
def test_what_can_t_be_shown_of_many_chains_is_said_once(run: Callable, place: Path) -> None:
    for number in range(5):
        with log(place, f"client-{number}") as mine:
            mine.append({"event": "call", **ENVELOPE, **decided(allowed=True, direction="outbound")})
    said = "nobody else vouches for it; all of it could have been written anew"
    lines = [line for line in run("audit", "verify").out.splitlines() if said in line]
    assert len(lines) == 1
    assert lines[0].startswith("  each of 5 chains (")
    assert " and 2 more, which --json lists): " in lines[0]
    assert sum(said in one for one in run("audit", "verify", "--json").json["cannot_show"]) == 5


def test_verify_needs_a_bundle_that_is_one(run: Callable, place: Path) -> None:
    sent(place)
    ran = run("audit", "verify", "--bundle", "shop.test")
    assert ran.code == 2
    assert "DOMAIN=FILE" in ran.err
    ran = run("audit", "verify", "--bundle", "shop.test=missing.pem")
    assert ran.code == 2
    assert "missing.pem" in ran.err


@pytest.mark.usefixtures("terminal")
def test_tail_shows_the_newest_of_all_logs(run: Callable, place: Path) -> None:
    sent(place)
    answered(place, refusal(4, "proof"))
    lines = run("audit", "tail", "-n", "2").out.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("REFUSED   an unknown sender at proof: because")
    assert len(run("audit", "tail").out.splitlines()) == 6
    assert run("audit", "tail", "-n", "0").out == ""


NONSENSE = [
    {"ts": 1e30},
    {"ts": -1e18},
    {"ts": float("nan")},
    {"ts": 10**400},
    {"ts": "now"},
    {"seq": "first"},
    {"digest": ["x"]},
    {"log": {}},
    {"input": []},
    {"log": None},
    {"input": {"context": {"via": [1]}}},
    {"input": {"context": {"via": [{"id": []}]}}},
    {"input": {"context": {"principal": "ada"}}},
    {"caller": None},
]


def written(place: Path, *records: dict[str, Any]) -> None:
    """Write a log that the real one would not write."""
    folder = place / ".agentweave" / "audit"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "forged.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("wrong", NONSENSE, ids=lambda wrong: next(iter(wrong)))
def test_a_record_that_is_nonsense_is_said_to_be(run: Callable, place: Path, wrong: dict[str, Any]) -> None:
    entry = {"ts": 5, "seq": 1, **refusal(11, "authorization", **ENVELOPE, **decided(allowed=False))}
    written(place, {**entry, "audit_id": "forged-1", **wrong})
    ran = run("why", "forged-1")
    assert ran.code == 0
    member = next(iter(wrong))
    assert ran.out.startswith("What the logs have of it is malformed: ")
    assert member in ran.out.partition("\n")[0]
    assert "forged       MALFORMED" in ran.out
    assert "forged       MALFORMED" in run("audit", "tail").out


@pytest.mark.parametrize("wrong", NONSENSE, ids=lambda wrong: next(iter(wrong)))
def test_nonsense_changes_nothing_of_what_is_said_of_others(
    run: Callable, place: Path, wrong: dict[str, Any]
) -> None:
    entry = answered(place, refusal(11, "authorization", **ENVELOPE, **decided(allowed=False)))
    written(place, {"event": "outcome", "ts": 9e15, **ENVELOPE, **decided(allowed=True), **wrong})
    story = run("why", entry).json
    assert (story["verdict"], story["rule"]) == ("denied", "because")


def test_a_line_too_deep_to_read_is_left_out(run: Callable, place: Path) -> None:
    entry = answered(place, refusal(4, "proof"))
    deep = place / ".agentweave" / "audit" / "deep.jsonl"
    deep.write_text('{"ts":' + "[" * 100_000 + "]" * 100_000 + "}\n")
    assert run("why", entry).json["verdict"] == "refused"
