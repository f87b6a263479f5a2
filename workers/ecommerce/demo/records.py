"""Checking the audit logs at the end: that they hold, and that a change to them would show."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from agentweave_bus.authz import AuditReport, verify_audit
from agentweave_bus.bus.records import evidence_check
from agentweave_bus.envelope import EnvelopeVerifier
from agentweave_bus.exceptions import BundleUnavailableError
from agentweave_bus.identity import ChainVerifier, X509Bundle
from workers.ecommerce.demo.screen import Check, Screen

__all__ = ["check_records"]

must = Check.must


def check_records(screen: Screen, logs: Path, authority: X509Bundle) -> None:
    """Verify every log in ``logs``, and a copy of them in which one byte is changed."""
    with screen.check("the audit logs of all agents and clients") as check:
        report = _verified(logs, authority)
        must(report.ok, "; ".join(problem.sentence for problem in report.problems))
        noted = sum(chain.witnessed_to >= 0 for chain in report.chains)
        must(noted > 0, "no peer has noted how far another's log had come")
        check.came_out(
            f"{len(report.chains)} chains, {report.records} records: no change, gap or cut",
            f"peers vouch for {noted} of them: they noted how far each had come, under its owner's signature",
        )
    with screen.check("a copy of them, one digit of an amount altered") as check, _copied(logs) as copy:
        name = _alter_an_amount(Path(copy))
        report = _verified(Path(copy), authority)
        must(not report.ok, "the change was not found")
        found = report.problems[0]
        check.came_out(f"found: {name}, line {found.line}", found.sentence)


def _verified(logs: Path, authority: X509Bundle) -> AuditReport:
    verifier = EnvelopeVerifier(ChainVerifier(_OneDomain(authority)))
    return verify_audit([logs], evidence_check=evidence_check(verifier))


def _copied(logs: Path) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="agentweave-demo-")
    shutil.copytree(logs, folder.name, dirs_exist_ok=True)
    return folder


def _alter_an_amount(logs: Path) -> str:
    for file in sorted(logs.glob("payment.*.jsonl")):
        text = file.read_text()
        if "39.98" in text:
            file.write_text(text.replace("39.98", "39.97", 1))
            return file.name.partition(".")[0]
    raise AssertionError("payment's log holds no amount")


class _OneDomain:
    """The bundle of the shop's trust domain, after its Workload API has gone."""

    def __init__(self, bundle: X509Bundle) -> None:
        self._bundle = bundle

    def bundle_for(self, trust_domain: str) -> X509Bundle:
        """Return the bundle, for its own domain."""
        if trust_domain != self._bundle.trust_domain:
            raise BundleUnavailableError(f"no bundle for {trust_domain}", trust_domain=trust_domain)
        return self._bundle
