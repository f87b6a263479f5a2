"""``agentweave audit``: verify audit logs, or show what they say."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificate

from agentweave_bus.authz import AuditReport, verify_audit
from agentweave_bus.authz.audit_reading import log_files, parsed, records_of
from agentweave_bus.bus.kept_frames import frame_check
from agentweave_bus.bus.records import evidence_check
from agentweave_bus.cli.audit_records import audit_paths, describe
from agentweave_bus.cli.client_config import STATE_DIR
from agentweave_bus.cli.commands import add_command
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.cli.output import counted, print_result, wants_json
from agentweave_bus.envelope import EnvelopeVerifier
from agentweave_bus.exceptions import ConfigurationError, FederationError
from agentweave_bus.identity import ChainVerifier, X509Bundle, claimed_spiffe_id

__all__ = ["add_arguments", "run_tail", "run_verify"]

_VERIFY_EPILOG: Final = """\
Example:
  agentweave audit verify
  agentweave audit verify /var/log/shop /mnt/logs-of-payment --bundle shop.test=bundle.pem

Give it every log that you can get, your peers' above all: what they noted about each other shows what was
cut or replaced. Exit code 0: nothing wrong was found, 1: something was.
"""
_TAIL_EPILOG: Final = """\
Example:
  agentweave audit tail -n 50
  agentweave audit tail -f --audit /var/log/shop
"""
_OF_A_CHAIN: Final = re.compile(r"chain (\S+): (?:after record (\d+) )?(.*)")
_NAMED: Final = 3
_LOOK_SECONDS: Final = 0.25  # appended files have no event that is portable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the commands."""
    parser.epilog = "Example:\n  agentweave audit verify\n"
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    verify = add_command(commands, "verify", "find changes, gaps and cuts in audit logs", _VERIFY_EPILOG)
    verify.add_argument("paths", nargs="*", metavar="PATH", help="files or directories (.agentweave/audit)")
    verify.add_argument(
        "--bundle",
        action="append",
        default=[],
        metavar="DOMAIN=FILE",
        help="PEM authorities of a trust domain, to check what peers signed; may be repeated"
        " (default: the authority of .agentweave)",
    )
    verify.add_argument("--json", action="store_true", help="as JSON also in a terminal")
    verify.set_defaults(run=run_verify)
    tail = add_command(commands, "tail", "show the newest records of all logs", _TAIL_EPILOG)
    tail.add_argument("-f", "--follow", action="store_true", help="go on with what is written from now on")
    tail.add_argument("-n", "--lines", type=int, default=20, metavar="COUNT", help="how many (default: 20)")
    tail.add_argument(
        "--audit",
        action="append",
        metavar="PATH",
        help="a directory or file (default: .agentweave/audit); may be repeated",
    )
    tail.add_argument("--json", action="store_true", help="whole records as JSON lines also in a terminal")
    tail.set_defaults(run=run_tail)


# --- verify ----------------------------------------------------------------------------------------------


def run_verify(options: argparse.Namespace) -> int:
    """Check the logs and print the report."""
    verifier = _verifier(options.bundle)
    report = verify_audit(
        audit_paths(options.paths),
        evidence_check=None if verifier is None else evidence_check(verifier),
        frame_check=None if verifier is None else frame_check(verifier),
    )
    print_result(report.to_json(), _report_text(report), json_wanted=options.json)
    return ExitCode.DONE if report.ok else ExitCode.FAILED


def _report_text(report: AuditReport) -> str:
    looked_at = f"{counted(report.records, 'record')} in {counted(len(report.chains), 'chain')}"
    lines = [f"{looked_at}: {'nothing wrong was found' if report.ok else 'NOT AS THEY WERE WRITTEN'}"]
    lines += [f"  {one.kind}: {one.file}:{one.line}: {one.sentence}" for one in report.problems]
    lines += [f"  note: {one.file}:{one.line}: {one.sentence}" for one in report.notes]
    lines += ["What this can't show:", *(f"  {sentence}" for sentence in _grouped(report.cannot_show))]
    return "\n".join(lines)


def _grouped(sentences: Iterable[str]) -> Iterator[str]:
    """Say what holds for several chains once: each call from the command line leaves a chain of its own."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for sentence in sentences:
        chain, record, said = (
            found.groups() if (found := _OF_A_CHAIN.fullmatch(sentence)) else ("", "", sentence)
        )
        groups.setdefault(said, []).append((sentence, f"{chain} after record {record}" if record else chain))
    for said, members in groups.items():
        if len(members) == 1:
            yield members[0][0]
            continue
        names = [name for _, name in members]
        more = f" and {len(names) - _NAMED} more, which --json lists" if len(names) > _NAMED else ""
        yield f"each of {len(names)} chains ({', '.join(names[:_NAMED])}{more}): {said}"


class _Bundles:
    """The trust bundles that were given, as a ``TrustSource``."""

    def __init__(self, bundles: dict[str, X509Bundle]) -> None:
        self._bundles = bundles

    def bundle_for(self, trust_domain: str) -> X509Bundle:
        try:
            return self._bundles[trust_domain]
        except KeyError:
            raise FederationError(
                f"no bundle of {trust_domain} was given (--bundle {trust_domain}=FILE)",
                trust_domain=trust_domain,
            ) from None


def _verifier(given: list[str]) -> EnvelopeVerifier | None:
    """Return what verifies kept frames and the heads under peers' notes; None where there is no bundle."""
    bundles = dict(_bundle(one) for one in given) or _own_bundle()
    return EnvelopeVerifier(ChainVerifier(_Bundles(bundles))) if bundles else None


def _bundle(text: str) -> tuple[str, X509Bundle]:
    domain, equals, name = text.partition("=")
    if not equals:
        raise ConfigurationError(f"--bundle {text!r}: write DOMAIN=FILE.", key="--bundle")
    return domain, X509Bundle.from_pem(domain, Path(name).read_bytes())


def _own_bundle() -> dict[str, X509Bundle]:
    """Return the bundle of this directory's development authority, if there is one."""
    chain, authorities = STATE_DIR / "broker" / "svid.pem", STATE_DIR / "authority" / "authorities.pem"
    if not (chain.is_file() and authorities.is_file()):
        return {}
    leaf = load_pem_x509_certificate(chain.read_bytes())
    domain = claimed_spiffe_id(leaf.public_bytes(Encoding.DER)).trust_domain
    return {domain: X509Bundle.from_pem(domain, authorities.read_bytes())}


# --- tail ------------------------------------------------------------------------------------------------


def run_tail(options: argparse.Namespace) -> int:
    """Show the newest records, and with ``-f`` those to come."""
    paths = audit_paths(options.audit)
    json_wanted = wants_json(options.json)
    files = {file: file.stat().st_size for file in log_files(paths)}
    newest = sorted((one for file in files for one in records_of(file)), key=lambda one: one.get("ts", 0))
    _show(newest[-max(0, options.lines) :] if options.lines > 0 else [], json_wanted)
    while options.follow:
        time.sleep(_LOOK_SECONDS)
        _show(sorted(_appended(paths, files), key=lambda one: one.get("ts", 0)), json_wanted)
    return ExitCode.DONE


def _appended(paths: list[Path], sizes: dict[Path, int]) -> list[dict[str, Any]]:
    """Read what was added since ``sizes``, whole lines only, and note how far that goes."""
    found: list[dict[str, Any]] = []
    for file in log_files(paths):
        with file.open("rb") as stream:
            stream.seek(sizes.get(file, 0))
            whole, newline, _torn = stream.read().rpartition(b"\n")
        sizes[file] = sizes.get(file, 0) + len(whole) + len(newline)
        found += parsed(whole.decode(errors="replace").splitlines(), file)
    return found


def _show(records: Iterable[dict[str, Any]], json_wanted: bool) -> None:
    for record in records:
        print(json.dumps(record) if json_wanted else describe(record), flush=True)
