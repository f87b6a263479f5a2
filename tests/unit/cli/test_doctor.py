"""``agentweave doctor`` as it is used: on files that lie here, with nothing running."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus.cli.checks.finding import Finding, Status, run_checks
from agentweave_bus.cli.checks.patient import examine
from agentweave_bus.cli.doctor import CHECKS, Doctor
from tests.unit.cli.conftest import Ran

Run = Callable[..., Ran]

PAYMENT = """
agent:
  name: payment
  trust_domain: shop.test
  class: payment:Payment
"""
CLASS = """
from agentweave_bus import SecureAgent, capability


class Payment(SecureAgent):
    @capability("pay")
    async def pay(self, amount: int) -> dict:
        return {}
"""


@pytest.fixture
def shop(place: Path) -> Path:
    """A stack with one agent, nothing of which is wrong."""
    (place / "payment.yaml").write_text(PAYMENT)
    (place / "payment.py").write_text(CLASS)
    add(place, "agents: [{config: payment.yaml}]")
    return place


def add(place: Path, text: str) -> None:
    with (place / "agentweave.yaml").open("a") as stack:
        stack.write(text + "\n")


def by_check(ran: Ran) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for one in ran.json["checks"]:
        found.setdefault(one["check"], []).append(one)
    return found


def test_a_stack_in_order_that_does_not_run(run: Run, shop: Path) -> None:
    ran = run("doctor")
    found = by_check(ran)
    assert (ran.code, ran.json["ok"]) == (0, True)
    assert list(found) == list(CHECKS)
    assert {one["status"] for name in found for one in found[name] if name != "stack"} == {"ok", "skipped"}
    assert found["stack"][0]["status"] == "warning"
    assert "1 agent can be made" in found["agents"][0]["found"]
    assert not (shop / ".agentweave").exists()


@pytest.mark.usefixtures("terminal", "place")
def test_people_read_a_table_with_what_to_do(run: Run) -> None:
    out = run("doctor").out
    assert "WARNING  stack" in out
    assert "-> Start agentweave up." in out
    assert out.rstrip().endswith("Nothing failed.")


def test_each_fault_of_a_stack_is_found_by_its_check(run: Run, shop: Path) -> None:
    (shop / "payment.py").write_text("raise RuntimeError('no key')\n")
    (shop / "grants.yaml").write_text(
        "grants:\n- {caller: spiffe://shop.test/client/clo, callee: spiffe://shop.test/agent/payment,"
        " capabilities: [pay]}\n"
    )
    (shop / ".agentweave" / "clients").mkdir(parents=True)
    (shop / ".agentweave" / "clients" / "cli.yaml").write_text("left: behind\n")
    (shop / ".agentweave" / "authority").mkdir(mode=0o755)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        add(shop, f"bus: {{port: {taken.getsockname()[1]}}}\nrevocations: gone.yaml")
        ran = run("doctor", "agentweave.yaml", "--timeout", "20")
    found = by_check(ran)
    assert ran.code == 2
    failed = {name for name, several in found.items() if any(one["status"] == "failed" for one in several)}
    assert failed == {"files", "ports", "agents", "revocations"}
    assert "no key" in found["agents"][0]["found"]
    assert "client/cli" in found["grants"][0]["found"]
    assert "ended without stopping" in found["stack"][0]["found"]


async def looked_at(*names: str) -> dict[str, list[Finding]]:
    """Run these checks only, in the doctor's order."""
    async with Doctor.of(examine(None, None, None), seconds=60.0) as doctor:
        checks = [check for check in doctor.checks() if check.name in names]
        found: dict[str, list[Finding]] = {}
        async for name, finding in run_checks(checks, deadline_s=60.0):
            found.setdefault(name, []).append(finding)
    return found


@pytest.mark.anyio
async def test_a_fault_is_told_once_with_its_place(shop: Path) -> None:
    """Two agents of one broken module and of one broken policy: one finding each."""
    (shop / "payment.py").write_text("import os\n\ndef pay(:\n")
    (shop / "refund.yaml").write_text(PAYMENT.replace("name: payment", "name: refund"))
    with (shop / "refund.yaml").open("a") as file:
        file.write("authorization: {policy_path: shop/refund}\n")
    (shop / "agentweave.yaml").write_text(
        "trust_domain: shop.test\ngrants: grants.yaml\nagents: [{config: payment.yaml}, {config: refund.yaml}]\n"
    )
    (shop / "grants.yaml").write_text("grants: [nonsense]\n")
    found = await looked_at("policy", "agents", "grants")
    (agents,) = found["agents"]
    assert agents.found == f"payment, refund: SyntaxError: invalid syntax ({shop}/payment.py:3)"
    (policy,) = found["policy"]
    assert "grants.yaml:1" in policy.found
    (grants,) = found["grants"]
    assert (grants.status, "see policy" in grants.found) == (Status.SKIPPED, True)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["gone.yaml"], "Name a file that is there"),
        (["grants.yaml"], "agentweave config check says more"),
        (["--as", "nobody"], ""),
    ],
)
@pytest.mark.usefixtures("shop")
def test_the_way_out_of_what_is_no_patient(run: Run, arguments: list[str], advice: str) -> None:
    (only,) = run("doctor", *arguments).json["checks"]
    assert advice in only.get("advice", "")
    assert ("advice" in only) == (advice != "")


@pytest.mark.usefixtures("shop")
def test_a_wrong_variable_is_corrected_not_the_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTWEAVE_BUS__CALL_TIMEOUT", "x")
    (only,) = run("doctor", "payment.yaml").json["checks"]
    assert only["advice"] == "Correct or unset AGENTWEAVE_BUS__CALL_TIMEOUT."


@pytest.mark.slow
def test_grants_are_compared_with_what_the_classes_offer(run: Run, shop: Path) -> None:
    (shop / "grants.yaml").write_text(
        "grants:\n- {caller: spiffe://shop.test/client/cli, callee: spiffe://shop.test/agent/payment,"
        " capabilities: [pray]}\n"
    )
    (grants,) = by_check(run("doctor"))["grants"]
    assert (grants["status"], "did you mean 'pay'?" in grants["found"]) == ("warning", True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gone.yaml"], "gone.yaml can't be read"),
        (["grants.yaml"], "grants.yaml:2: grants"),
        (["--as", "nobody"], "no client 'nobody'"),
    ],
)
@pytest.mark.usefixtures("place")
def test_what_is_no_patient(run: Run, arguments: list[str], said: str) -> None:
    ran = run("doctor", *arguments)
    (only,) = ran.json["checks"]
    assert (ran.code, only["check"], only["status"]) == (2, "configuration", "failed")
    assert said in only["found"]


def test_without_anything_the_way_to_begin_is_named(run: Run, place: Path) -> None:
    (place / "agentweave.yaml").unlink()
    assert "agentweave new hello" in run("doctor").json["checks"][0]["found"]


def test_an_agents_file_is_looked_at_by_itself(run: Run, shop: Path) -> None:
    """No broker, no Workload API: what comes first is said, and what needs it is skipped."""
    with (shop / "payment.yaml").open("a") as file:
        file.write(f"identity: {{spiffe_endpoint: 'unix://{shop}/no.sock'}}\n")
    ran = run("doctor", "payment.yaml")
    found = by_check(ran)
    assert ran.code == 4
    assert "no Workload API at" in found["workload-api"][0]["found"]
    assert {found[name][0]["status"] for name in ("svid", "broker", "clock")} == {"skipped"}
    assert found["policy"][0]["status"] == "warning"
