"""Logs can be verified, shown and asked why, with records that the real log wrote."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus.agent.failures import correlation_id
from agentweave_bus.authz import AuditLog, AuthzContext, AuthzDecision
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


def test_an_issuer_or_origin_that_no_grant_lists(run: Callable, place: Path) -> None:
    story = why_denied(run, place, principal=ADA)
    assert story["add_to_a_grant"] == ['principals: ["https://login.example"]']
    story = why_denied(run, place, "refund", principal=ADA)
    assert '    principals: ["https://login.example"]\n' in story["would_allow"]
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


def test_an_agent_that_the_stack_does_not_have(run: Callable, place: Path) -> None:
    (place / "agentweave.yaml").write_text("trust_domain: shop.test\nagents: [{config: p.yaml}]\n")
    (place / "p.yaml").write_text("agent: {name: payments, trust_domain: shop.test, class: 'a:B'}\n")
    assert why_denied(run, place)["no_such_agent"].endswith("has no agent payment; did you mean payments?")
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
    assert text.startswith("3 records in 1 chains: nothing wrong was found\nWhat this can't show:")


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
