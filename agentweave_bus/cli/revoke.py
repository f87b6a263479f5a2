"""``agentweave authz revoke``: put an identity, certificate or authority into the file of revocations."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import ValidationError

from agentweave_bus.cli.client_config import named_or_written
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.cli.output import message, print_result
from agentweave_bus.cli.stack_agents import unknown_identity
from agentweave_bus.config import load_config, load_stack
from agentweave_bus.config.stack import DEFAULT_STACK_FILE
from agentweave_bus.exceptions import ConfigurationError, IdentityError
from agentweave_bus.identity import claimed_spiffe_id
from agentweave_bus.identity.revocation_file import RevokedEntry, add_revocation, remove_revocations

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG: Final = """\
Example:
  agentweave authz revoke --spiffe-id spiffe://shop.test/agent/order --reason "laptop stolen"
  agentweave authz revoke --spiffe-id spiffe://shop.test/agent/order --issued-before now \\
      --reason "key in a log"
  agentweave authz revoke --certificate order.pem --reason "key in a log" --file revoked.yaml
  agentweave authz revoke --spiffe-id spiffe://shop.test/agent/order --undo

The file is the one that agentweave.yaml or the client's configuration names; all who follow it see the
change within a second.
"""
_NO_REASON: Final = "taken back"  # never written: an undone entry is gone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--spiffe-id", metavar="SPIFFE_ID", help="everything of this identity")
    what.add_argument("--fingerprint", metavar="SHA256", help="one certificate, by SHA-256 of its DER")
    what.add_argument("--certificate", metavar="FILE", help="one certificate: the first of a PEM file")
    what.add_argument("--authority", metavar="FILE|SHA256", help="what an authority or intermediate signed")
    parser.add_argument(
        "--issued-before",
        metavar="TIME",
        help="with --spiffe-id: only certificates older than this (now, or 2026-01-31T12:00:00Z)",
    )
    parser.add_argument("--reason", metavar="TEXT", help="why, for people; needed unless --undo")
    parser.add_argument("--file", metavar="FILE", help="the file of revocations; made if it is not there")
    parser.add_argument("--undo", action="store_true", help="take it out of the file again")
    parser.add_argument("--json", action="store_true", help="as JSON also in a terminal")
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True)
class _Target:
    """The file that is to be changed, and whether anybody here is known to follow it."""

    path: Path
    followed_by: str | None


def run(options: argparse.Namespace) -> int:
    """Change the file and say what was done."""
    target = _target(options.file)
    entry = _entry(options)
    if options.undo:
        changed = remove_revocations(target.path, entry.subject)
    else:
        changed = add_revocation(target.path, entry)
    what = next(str(one) for one in entry.subject if one is not None)
    facts = {
        "file": str(target.path),
        "changed": changed,
        "revoked": not options.undo,
        "entry": {"undone": what} if options.undo else entry.to_data(),
        "followed_by": target.followed_by,
    }
    print_result(facts, _text(what, target, changed, undo=options.undo), json_wanted=options.json)
    if changed and not options.undo and (unknown := _unknown(entry)) is not None:
        message(f"agentweave: warning: {unknown} It is revoked all the same; --undo takes it back.")
    if target.followed_by is None:
        message(
            f"agentweave: warning: nothing here is known to follow {target.path}; set identity.revocations"
            " (of agents and clients) or revocations (of a stack) to it."
        )
    return ExitCode.DONE


def _unknown(entry: RevokedEntry) -> str | None:
    """Say that nobody here bears the identity: a typo would leave whom it is about trusted."""
    return None if entry.spiffe_id is None else unknown_identity(entry.spiffe_id)


def _text(what: str, target: _Target, changed: bool, *, undo: bool) -> str:
    if not changed:
        return f"{target.path}: nothing to do, {what} is {'not there' if undo else 'revoked already'}."
    return f"{target.path}: {what} is {'no longer revoked' if undo else 'revoked'}."


# --- what ------------------------------------------------------------------------------------------------


def _entry(options: argparse.Namespace) -> RevokedEntry:
    if options.reason is None and not options.undo:
        raise ConfigurationError("A revocation needs a reason.", key="--reason", hint="Say why, for others.")
    given: dict[str, Any] = {
        "spiffe_id": options.spiffe_id,
        "fingerprint": _leaf(Path(options.certificate)) if options.certificate else options.fingerprint,
        "authority": _authority(options.authority),
        "issued_before": _time(options.issued_before),
        "reason": options.reason or _NO_REASON,
        "time": datetime.now(UTC).replace(microsecond=0),
    }
    try:
        return RevokedEntry.model_validate({key: one for key, one in given.items() if one is not None})
    except ValidationError as error:
        said = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise ConfigurationError(f"{said}.", key="--spiffe-id") from error


def _time(text: str | None) -> datetime | str | None:
    if text != "now":
        return text
    # The next whole second, in which certificates count: what was issued up to this moment lies before it.
    return datetime.fromtimestamp(math.floor(datetime.now(UTC).timestamp()) + 1, UTC)


def _leaf(path: Path) -> str:
    certificate = _certificates(path)[0]
    try:
        owner = claimed_spiffe_id(certificate.public_bytes(Encoding.DER))
    except IdentityError as error:
        raise ConfigurationError(
            f"{path}: {error}.", key="--certificate", hint="Revoke an authority by --authority."
        ) from error
    message(f"{path} is {owner}'s, until {certificate.not_valid_after_utc.isoformat()}.")
    return certificate.fingerprint(SHA256()).hex()


def _authority(text: str | None) -> str | None:
    if text is None or not Path(text).is_file():
        return text
    certificates = _certificates(Path(text))
    if len(certificates) > 1:
        prints = ", ".join(one.fingerprint(SHA256()).hex() for one in certificates)
        raise ConfigurationError(
            f"{text} holds {len(certificates)} certificates.",
            key="--authority",
            hint=f"Name one of {prints}.",
        )
    return certificates[0].fingerprint(SHA256()).hex()


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} holds no certificate in PEM.") from error


# --- where -----------------------------------------------------------------------------------------------


def _target(named: str | None) -> _Target:
    configured, by = _configured()
    if named is not None:
        path = Path(named)
        same = configured is not None and configured.absolute() == path.absolute()
        return _Target(path, by if same else None)
    if configured is None:
        raise ConfigurationError(
            f"It is not said which file: {by or 'no configuration here'} names none.",
            key="--file",
            hint="Set revocations: revoked.yaml there, or name a file with --file.",
        )
    return _Target(configured, by)


def _configured() -> tuple[Path | None, str | None]:
    """Return the file that this directory's stack or client follows, and who says so."""
    if Path(DEFAULT_STACK_FILE).exists():
        return load_stack().revocations, DEFAULT_STACK_FILE
    path, _ = named_or_written()
    if not path.is_file():
        return None, None
    return load_config(path).identity.revocations, str(path)
