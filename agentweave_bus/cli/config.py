"""``agentweave config check``: whether a file is right, and what is then in effect."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

import yaml

from agentweave_bus.authz import Grants
from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.cli.output import message, print_result
from agentweave_bus.cli.stack_check import stack_warnings
from agentweave_bus.config import load_config, load_control, load_stack
from agentweave_bus.config.document import read_document
from agentweave_bus.control.grants_watch import GrantsWatch, unlisted_prefixes
from agentweave_bus.embedded.assembly import plan_agents
from agentweave_bus.identity import RevocationWatch

__all__ = ["add_arguments", "is_stack", "run_check"]

_EPILOG: Final = """\
Example:
  agentweave config check order.yaml
  agentweave config check agentweave.yaml --env development

FILE is an agent's or client's configuration, a stack's, or a control role's; a stack's agents and grants are
checked, too. A control role's has bus.servers, identity, identities or streams.
Defaults are filled in and AGENTWEAVE_... variables applied. Exit code 2: it is wrong.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = "Example:\n  agentweave config check order.yaml\n"
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    check = commands.add_parser(
        "check",
        help="check a file and print the effective configuration",
        description="Check a file and print the effective configuration; warnings go to standard error.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    check.add_argument("file", metavar="FILE", help="the YAML to check")
    check.add_argument(
        "--env", choices=("production", "development"), help="instead of AGENTWEAVE_ENV; else production"
    )
    check.add_argument("--json", action="store_true", help="as JSON also in a terminal")
    check.set_defaults(run=run_check)


def run_check(options: argparse.Namespace) -> int:
    """Check the file; print what is in effect and what should be known."""
    path = Path(options.file)
    check = _control if _is_control(path) else _stack if is_stack(path) else _agent
    effective, warnings = check(path, options.env)
    for warning in warnings:
        message(f"agentweave: warning: {warning}")
    text = yaml.safe_dump(effective, sort_keys=False, allow_unicode=True).rstrip()
    print_result({"ok": True, "warnings": warnings, "effective": effective}, text, json_wanted=options.json)
    return ExitCode.DONE


def is_stack(path: Path) -> bool:
    """Say whether a file is a stack's. Raises ConfigurationError: it can't be read."""
    tree = read_document(path).value
    return "agent" not in tree and not {"agents", "grants", "policies", "clients"}.isdisjoint(tree)


def _is_control(path: Path) -> bool:
    """Say whether a file is a control role's: it has keys that no stack has."""
    tree = read_document(path).value
    bus = tree.get("bus")
    reaches_brokers = isinstance(bus, dict) and "servers" in bus
    return "agent" not in tree and (
        reaches_brokers or not {"identity", "identities", "streams"}.isdisjoint(tree)
    )


def _control(path: Path, environment: str | None) -> tuple[dict[str, Any], list[str]]:
    config = load_control(path, environment=environment)
    RevocationWatch(config.identity.revocations)
    grants = GrantsWatch(config.grants).current
    domains = config.identity.allowed_trust_domains
    unlisted = unlisted_prefixes(grants, domains, config.identities)
    return _plain(config), [*config.warnings, *_grants_warnings(config.grants), *unlisted]


def _agent(path: Path, environment: str | None) -> tuple[dict[str, Any], list[str]]:
    config = load_config(path, environment=environment)
    RevocationWatch(config.identity.revocations)
    return _plain(config), [*config.warnings, *_grants_warnings(config.authorization.bundle)]


def _stack(path: Path, environment: str | None) -> tuple[dict[str, Any], list[str]]:
    config = load_stack(path)
    agents = plan_agents(config, environment)
    RevocationWatch(config.revocations_file)
    warnings = [f"{agent.config.agent.name}: {text}" for agent in agents for text in agent.config.warnings]
    return _plain(config), [*warnings, *stack_warnings(config, agents, environment)]


def _grants_warnings(source: Path | None) -> list[str]:
    file = grants_file(source)
    return [] if file is None else [f"{file}: {text}" for text in Grants.load(file).warnings()]


def _plain(config: Any) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(config.model_dump_json(by_alias=True))
    return plain
