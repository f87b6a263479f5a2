"""``agentweave new``: a runnable agent with its grants and a test."""

from __future__ import annotations

import argparse
import keyword
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Final

from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.cli.output import print_result
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.spiffe_id import SpiffeID, check_trust_domain

__all__ = ["add_arguments", "run", "write_agent"]

_EPILOG: Final = """\
Example:
  agentweave new hello
  cd hello
  agentweave up
and in another terminal, in the same directory:
  agentweave call --target spiffe://agentweave.local/agent/hello --capability greet --data '{"who": "Ada"}'
"""
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,47}")
_FILES: Final = {
    "agent.py": "{module}.py",
    "test_agent.py": "test_{module}.py",
    "agent.yaml": "{name}.yaml",
    "agentweave.yaml": "agentweave.yaml",
    "grants.yaml": "grants.yaml",
    "authz-tests.yaml": "authz-tests.yaml",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.add_argument("name", metavar="NAME", help="the agent's name: lower-case letters, digits, - and _")
    parser.add_argument("--dir", metavar="DIR", help="where to (default: a new directory NAME)")
    parser.add_argument(
        "--trust-domain", default="agentweave.local", metavar="DOMAIN", help="default: agentweave.local"
    )
    parser.add_argument("--json", action="store_true", help="as JSON also in a terminal")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the files and say what to do with them."""
    folder = Path(options.dir or options.name)
    files = write_agent(options.name, folder, check_trust_domain(options.trust_domain))
    agent = SpiffeID.of(options.trust_domain, "agent", options.name)
    text = "\n".join(
        (
            f"Written to {folder}: {', '.join(path.name for path in files)}.",
            f"Start it:   cd {folder} && agentweave up",
            "Then, in another terminal in that directory:",
            f"  agentweave call --target {agent} --capability greet",
            "Its tests:  pytest, and agentweave authz test",
        )
    )
    print_result(
        {"agent": str(agent), "files": [str(path) for path in files]}, text, json_wanted=options.json
    )
    return ExitCode.DONE


def write_agent(name: str, folder: Path, trust_domain: str) -> list[Path]:
    """Write a new agent's files into ``folder``; nothing that is there is changed.

    Raises:
        ConfigurationError: the name can't be one, or a file is there already; then nothing is written.

    """
    module = name.replace("-", "_")
    if not _NAME.fullmatch(name) or keyword.iskeyword(module) or name == "agentweave":
        raise ConfigurationError(
            f"{name!r} can't be an agent's name.",
            key="NAME",
            hint="Use up to 48 lower-case letters, digits, - and _, beginning with a letter.",
        )
    values = {"name": name, "module": module, "domain": trust_domain, "logic": _class_name(module)}
    texts = {
        folder / target.format(name=name, module=module): _filled(template, values)
        for template, target in _FILES.items()
    }
    if there := [str(path) for path in texts if path.exists()]:
        raise ConfigurationError(
            f"{', '.join(there)}: there already, so nothing was written.",
            hint="Name another directory with --dir.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)


def _class_name(module: str) -> str:
    return "".join(part.capitalize() for part in module.split("_") if part)


def _filled(template: str, values: dict[str, str]) -> str:
    text = (resources.files("agentweave_bus.cli") / "templates" / f"{template}.tmpl").read_text("utf-8")
    return Template(text).substitute(values)
