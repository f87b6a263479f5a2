"""The shipped policies: their own tests pass, and what is shipped is what is compiled."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from agentweave_bus.authz import policy_source
from agentweave_bus.authz.policy_data import read_data
from agentweave_bus.authz.policy_input import write_input
from agentweave_bus.authz.policy_source import OPA_VERSION, SHIPPED, compile_policies, find_opa
from agentweave_bus.authz.wasm import EmbeddedEngine
from agentweave_bus.exceptions import PolicyLoadError

POLICIES = Path(__file__).parents[3] / "policies"
PACKAGES = {
    "acme/authz",
    "admin/authz",
    "agentweave/authz",
    "agentweave/grants",
    "company/authz",
    "gateway/authz",
    "inventory/authz",
    "order/authz",
    "partner/authz",
    "payment/authz",
    "user/authz",
}


def opa() -> Path:
    found = find_opa()
    if found is None:
        pytest.skip(
            "no opa binary: 'make tools' builds it; without it the policies are tested as compiled only"
        )
    return found


def run_opa(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [opa(), *arguments], cwd=POLICIES, capture_output=True, text=True, timeout=60, check=False
    )


def test_opa_test_passes_for_every_policy() -> None:
    done = run_opa("test", ".", "--format", "pretty")
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"PASS: (\d+)/(\d+)", done.stdout)
    assert passed is not None
    assert int(passed[1]) == int(passed[2]) >= 30


def test_policies_are_strict_and_formatted() -> None:
    checked = run_opa("check", "--strict", ".")
    assert checked.returncode == 0, checked.stderr
    assert run_opa("fmt", "--list", ".").stdout == ""


def test_every_package_has_a_test() -> None:
    tests = "".join(path.read_text() for path in POLICIES.glob("*_test.rego"))
    for package in PACKAGES:
        assert f"data.{package.replace('/', '.')}" in tests


def test_the_compiled_policy_is_made_of_these_sources() -> None:
    """Byte for byte: what reviewers read is what runs."""
    version = run_opa("version").stdout
    if f"Version: {OPA_VERSION}\n" not in version:
        pytest.skip(f"the opa at hand is not {OPA_VERSION}; another compiler writes other bytes")
    assert compile_policies(POLICIES) == (POLICIES / "policy.wasm").read_bytes()


def test_what_is_shipped_is_that_directory() -> None:
    assert SHIPPED.resolve() == POLICIES.resolve()


def test_all_packages_are_compiled(tmp_path: Path) -> None:
    engine = EmbeddedEngine.from_directory(None, cache=tmp_path)
    assert engine.packages == PACKAGES
    assert {
        package for package in PACKAGES if engine.has_standing(package)
    } == policy_source._SHIPPED_STANDING


@pytest.mark.parametrize(("hour", "allowed"), [(8, False), (9, True), (17, True), (18, False)])
def test_business_hours_in_the_embedded_engine(tmp_path: Path, hour: int, allowed: bool) -> None:
    (tmp_path / "data.yaml").write_text(
        "allowed_callers: {'spiffe://a.io/agent/x': ['spiffe://a.io/client/cli']}\n"
        "business_hours: {from: 9, to: 17, time_zone: Europe/Berlin}\n"
    )
    one_hour = 3_600_000_000_000
    winter = 1_767_225_600_000_000_000  # 2026-01-01T00:00:00Z, when Berlin is an hour ahead
    engine = EmbeddedEngine(cache=tmp_path, now_ns=lambda: winter + (hour - 1) * one_hour)
    engine.load(tmp_path)
    asked = write_input(
        {
            "caller_spiffe_id": "spiffe://a.io/client/cli",
            "callee_spiffe_id": "spiffe://a.io/agent/x",
            "action": "y",
        }
    )
    assert engine.evaluate_now("agentweave/authz", asked).result["allow"] is allowed


def test_a_lock_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.rego").write_text("package own.authz\n\nallow := true\n")
    (tmp_path / "policy.wasm").write_bytes(b"x")
    (tmp_path / "policy.lock").write_text("[" * 100_000)
    with pytest.raises(PolicyLoadError, match="is malformed"):
        policy_source.load_policy(tmp_path, tmp_path / "cache")


@pytest.mark.parametrize(
    "slip",
    ["a: !!bool x", "a: !!timestamp x", "a: !!int ''", "? [a]", "a: &a {b: c}\nd: {<<: *a}", "a: &a [*a]"],
)
def test_a_slip_of_any_kind_in_the_data_is_refused(tmp_path: Path, slip: str) -> None:
    (tmp_path / "data.yaml").write_text(f"day: 2026-02-30\n{slip}\n")
    with pytest.raises(PolicyLoadError, match=r"data\.yaml:[23]: "):
        read_data(tmp_path)


def test_a_date_in_the_data_is_text(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("day: 2026-02-28\n")
    assert b'"day":"2026-02-28"' in read_data(tmp_path).replace(b" ", b"")


def test_partners_of_a_grants_file_reach_the_partner_policy(tmp_path: Path) -> None:
    (tmp_path / "grants.yaml").write_text(
        "partners: {acme-corp.io: {max_transaction: 100, daily_limit: 500}}\n"
    )
    engine = EmbeddedEngine.from_directory(tmp_path, cache=tmp_path)
    asked = {
        "caller_spiffe_id": "spiffe://acme-corp.io/agent/billing",
        "callee_spiffe_id": "spiffe://partner.com/agent/payment",
        "action": "process_payment",
        "context": {"payload": {"billing_id": "b", "customer_id": "c", "amount": "100"}},
    }
    allowed = engine.evaluate_now("partner/authz", write_input(asked)).result
    assert allowed == {"allow": True, "reason": "partner.authz allows it", "limits": {"daily_limit": 500}}
    asked["context"] = {"payload": {"billing_id": "b", "customer_id": "c", "amount": "100.01"}}
    denied = engine.evaluate_now("partner/authz", write_input(asked)).result
    assert denied["reason"] == "the amount is above max_transaction 100 of acme-corp.io"
