"""``agentweave authz broker``: the broker's users, as nats-server's configuration takes them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Final

from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.cli.output import counted, message
from agentweave_bus.config import load_control
from agentweave_bus.control.broker import broker_users, users_configuration
from agentweave_bus.control.grants_watch import GrantsWatch, participants, unlisted_prefixes
from agentweave_bus.envelope import control_role
from agentweave_bus.identity import RevocationWatch

__all__ = ["EPILOG", "add_arguments"]

EPILOG: Final = """\
Example:
  agentweave authz broker control.yaml --write users.conf
  agentweave authz broker control.yaml

FILE is the control role's YAML. Include what is written in the configuration of each of your servers, and
have them take it: nats-server --signal reload. Who is revoked has no user. The same grants give the same
text.
"""
_COMMENT: Final = """\
Users and their permissions, by `agentweave authz broker {file}`. Made anew when the grants change: what is
changed here by hand is lost. Include it beside tls { verify_and_map: true }, and never set no_auth_user."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.add_argument("file", metavar="FILE", help="the control role's YAML")
    parser.add_argument("--write", metavar="FILE", help="replace a file with it, whole or not at all")
    parser.add_argument(
        "--env", choices=("production", "development"), help="instead of AGENTWEAVE_ENV; else production"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print or write the users."""
    config = load_control(options.file, environment=options.env)
    grants = GrantsWatch(config.grants).current
    revoked = RevocationWatch(config.identity.revocations).list.revoked.spiffe_ids
    domains = config.identity.allowed_trust_domains
    for warning in unlisted_prefixes(grants, domains, config.identities):
        message(f"agentweave: warning: {warning}")
    users = broker_users(
        grants,
        participants(grants, domains, config.identities),
        control=[control_role(config.trust_domain)],
    )
    heard = [user for user in users if user["user"] not in revoked]
    text = users_configuration(heard, comment=_COMMENT.replace("{file}", Path(options.file).name))
    if options.write is None:
        sys.stdout.write(text)
        return ExitCode.DONE
    _replace(Path(options.write), text)
    message(f"{options.write}: {counted(len(heard), 'user')}. Have every server reload its configuration.")
    return ExitCode.DONE


def _replace(path: Path, text: str) -> None:
    """Write the file so that a server that reads it now never sees half of it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        draft.write_text(text)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
