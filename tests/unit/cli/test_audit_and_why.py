"""Logs can be verified, shown and asked why, with records that the real log wrote."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

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
    context = AuthzContext(
        caller=CLI, callee=PAYMENT, action=action, direction=direction, payload={"amount": 500}
    )
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
