"""What docs/grants-and-policies.md shows is what works."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus.authz.approval_terms import read_require_approval
from agentweave_bus.authz.decision import ApprovalTerms, AuthzContext
from agentweave_bus.authz.grants import Grants
from agentweave_bus.authz.policy_input import write_input
from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.authz.wasm import EmbeddedEngine

PAGE = (Path(__file__).parents[3] / "docs" / "grants-and-policies.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def order_of(quantity: int) -> bytes:
    return write_input(
        {
            "caller_spiffe_id": "spiffe://agentweave.io/agent/gateway",
            "callee_spiffe_id": "spiffe://agentweave.io/agent/order",
            "action": "create_order",
            "context": {"kind": "call", "payload": {"items": [{"quantity": quantity}], "amount": 5}},
        }
    )


def charge(amount: int, *, by: str = "", direction: str = "inbound") -> tuple[bytes, str]:
    """A question about a task of that amount, and who approves of large ones."""
    asked = {
        "caller_spiffe_id": "spiffe://agentweave.io/agent/gateway",
        "callee_spiffe_id": "spiffe://agentweave.io/agent/order",
        "action": "create_order",
        "direction": direction,
        "context": {"kind": "task", "payload": {"amount": amount}} | ({"approval": {"by": by}} if by else {}),
    }
    return write_input(asked), "spiffe://agentweave.io/person/anna"


def test_grants_of_the_page_are_valid() -> None:
    entry, limits, approval, others = blocks("yaml")
    whole = Grants.parse(entry + limits + approval + others)
    assert whole.grants[0].approval is not None
    assert (whole.grants[0].approval.above, whole.grants[0].approval.within) == ({"amount": 1000}, 3600)
    assert whole.grants[0].limits == {"max_amount": 1000, "min_amount": 0.01, "max_per_minute": 60}
    assert whole.partners["other.example"].daily_limit == 10000
    assert whole.operators[0].may == ("control:cancel", "control:observe")


def test_the_input_of_the_page_is_the_input_of_a_policy() -> None:
    (shown,) = (json.loads(block) for block in blocks("json"))
    question: dict[str, Any] = {
        "caller": "spiffe://agentweave.io/agent/x",
        "callee": "spiffe://agentweave.io/agent/y",
        "action": "create_order",
        "direction": "outbound",
    }
    bare = AuthzContext(**question).to_input()
    whole = AuthzContext(**question, principal={}, scope=[]).to_input()
    assert shown.keys() == whole.keys()
    assert shown["context"].keys() == whole["context"].keys()
    assert whole["context"].keys() - bare["context"].keys() == {"principal", "scope"}
    assert (bare["context"]["via"], bare["context"]["task_id"]) == ([], "")
    assert bare["context"]["evidence"] == shown["context"]["evidence"]


@pytest.mark.skipif(find_opa() is None, reason="no opa binary: run 'make tools' to have Rego compiled")
def test_rego_and_programs_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "grants.yaml").write_text(blocks("yaml")[0])
    (folder / "order.rego").write_text(blocks("rego")[0])
    (folder / "charge.rego").write_text(blocks("rego")[1])
    monkeypatch.chdir(tmp_path)
    for program in blocks("python"):
        exec(compile(program, "page", "exec"), {})
    assert (folder / "policy.lock").exists()
    assert (tmp_path / "bundle.tar.gz").exists()
    engine = EmbeddedEngine.from_directory(folder, cache=tmp_path / "cache")
    assert engine.evaluate_now("order/authz", order_of(100)).result is True
    assert engine.evaluate_now("order/authz", order_of(101)).result is False
    question, anna = charge(1000)
    assert engine.evaluate_now("charge/authz", question).result == {"allow": True}
    asked = engine.evaluate_now("charge/authz", charge(1001)[0]).result
    assert read_require_approval(asked["require_approval"])[1] == ApprovalTerms((anna,), 3600)
    assert engine.evaluate_now("charge/authz", charge(1001, by=anna)[0]).result == {"allow": True}
    assert engine.evaluate_now("charge/authz", charge(1001, direction="outbound")[0]).result["allow"]
