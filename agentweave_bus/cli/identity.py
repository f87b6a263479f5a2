"""``agentweave identity``: the SVID and trust bundles that a configuration gets."""

from __future__ import annotations

import argparse
import asyncio
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from agentweave_bus.cli.client_config import add_identity_arguments, find_client_config
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.cli.output import counted, message, print_result
from agentweave_bus.config import AgentConfig
from agentweave_bus.identity import IdentitySnapshot, IdentitySource
from agentweave_bus.runtime.identities import configured_provider

__all__ = ["add_arguments", "run_fetch", "run_show"]

_SHOW_EPILOG: Final = "Example:\n  agentweave identity show\n  agentweave identity show --config order.yaml\n"
_FETCH_EPILOG: Final = """\
Example:
  agentweave identity fetch > chain.pem
  agentweave identity fetch --write ./svid

Without --write the certificate chain is printed. With it, svid.pem, key.pem (readable by you only) and a
bundle.<trust domain>.pem for each trust domain are written. The key then lies on disk until you remove it.
"""
_SECONDS: Final = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the commands."""
    parser.epilog = "Example:\n  agentweave identity show\n"
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary, epilog, run in (
        ("show", "say who I am, until when, and whom I trust", _SHOW_EPILOG, run_show),
        ("fetch", "print the certificate chain, or write chain, key and bundles", _FETCH_EPILOG, run_fetch),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_identity_arguments(command)
        command.set_defaults(run=run)
        if name == "show":
            command.add_argument("--json", action="store_true", help="as JSON also in a terminal")
        else:
            command.add_argument("--write", metavar="DIR", help="write files there instead")


def run_show(options: argparse.Namespace) -> int:
    """Print what the current SVID says."""
    snapshot = asyncio.run(_fetch(find_client_config(options)))
    facts = _facts(snapshot)
    text = "\n".join(f"{name + ':':<14} {value}" for name, value in facts.items() if name != "bundles")
    bundles = "".join(
        f"\n  {domain}: {counted(count, 'authority', 'authorities')}"
        for domain, count in facts["bundles"].items()
    )
    print_result(facts, f"{text}\nbundles:{bundles}", json_wanted=options.json)
    return ExitCode.DONE


def run_fetch(options: argparse.Namespace) -> int:
    """Print the chain, or write everything to files."""
    snapshot = asyncio.run(_fetch(find_client_config(options)))
    if options.write is None:
        print(snapshot.svid.chain_pem().decode(), end="")
        return ExitCode.DONE
    folder = Path(options.write)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(folder / "svid.pem", snapshot.svid.chain_pem())
    _write(folder / "key.pem", snapshot.svid.key_pem())
    for domain, bundle in snapshot.bundles.items():
        _write(folder / f"bundle.{domain}.pem", bundle.to_pem())
    message(f"{folder}: the SVID of {snapshot.svid.spiffe_id} with its key, until {snapshot.svid.expiry}.")
    return ExitCode.DONE


async def _fetch(config: AgentConfig) -> IdentitySnapshot:
    source = IdentitySource(
        configured_provider(config.identity, config.agent.spiffe_id),
        allowed_trust_domains=config.identity.allowed_trust_domains,
        expected_id=config.agent.spiffe_id,
    )
    await source.start(_SECONDS)
    try:
        return source.current
    finally:
        await source.aclose()


def _facts(snapshot: IdentitySnapshot) -> dict[str, Any]:
    svid = snapshot.svid
    left = svid.expiry - datetime.now(UTC)
    return {
        "spiffe_id": str(svid.spiffe_id),
        "not_before": svid.not_before.isoformat(),
        "expiry": svid.expiry.isoformat(),
        "seconds_left": int(left.total_seconds()),
        "x5t": svid.x5t.hex(),
        "issuer": svid.leaf.issuer.rfc4514_string(),
        "bundles": {domain: len(bundle.authorities) for domain, bundle in snapshot.bundles.items()},
    }


def _write(path: Path, content: bytes) -> None:
    """Write a file that was never readable by others; one that is there is replaced."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    draft.replace(path)
