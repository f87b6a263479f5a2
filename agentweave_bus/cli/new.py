"""``agentweave new``: a runnable agent with its grants and a test, or one more for a stack that is there."""

from __future__ import annotations

import argparse
import keyword
import re
import sys
from dataclasses import dataclass
from importlib import resources
from importlib.machinery import NamespaceLoader
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Final

from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.cli.output import print_result
from agentweave_bus.config import load_stack
from agentweave_bus.config.stack import DEFAULT_STACK_FILE
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.spiffe_id import SpiffeID, check_trust_domain

__all__ = ["NewAgent", "add_arguments", "run"]

_EPILOG: Final = """\
Example:
  agentweave new hello
  cd hello
  agentweave up
and in another terminal, in the same directory:
  agentweave call --target spiffe://agentweave.local/agent/hello --capability greet --data '{"who": "Ada"}'

One more agent for the stack of this directory:
  agentweave new stock --dir .
"""
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,47}")
_OWN: Final = {
    "agent.py": "{module}.py",
    "test_agent.py": "test_{module}.py",
    "agent.yaml": "{name}.yaml",
}
_SHARED: Final = {
    "agentweave.yaml": DEFAULT_STACK_FILE,
    "grants.yaml": "grants.yaml",
    "authz-tests.yaml": "authz-tests.yaml",
}
_DEFAULT_DOMAIN: Final = "agentweave.local"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.epilog = _EPILOG
    parser.add_argument("name", metavar="NAME", help="the agent's name: lower-case letters, digits, - and _")
    parser.add_argument(
        "--dir", metavar="DIR", help="where to (default: a new directory NAME); may hold a stack already"
    )
    parser.add_argument(
        "--trust-domain",
        metavar="DOMAIN",
        help=f"default: that of the stack in DIR, else {_DEFAULT_DOMAIN}",
    )
    parser.add_argument("--json", action="store_true", help="as JSON also in a terminal")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the files and say what to do with them."""
    folder = Path(options.dir or options.name)
    _check_name(options.name)
    stack = _Stack.of(folder)
    agent = NewAgent(options.name, _trust_domain(options.trust_domain, stack))
    files = agent.write(folder, shared=stack is None)
    add = {} if stack is None else stack.additions(agent)
    text = "\n".join(
        (
            f"Written to {folder}: {', '.join(path.name for path in files)}.",
            *(f"Add to {file}, under {key}:\n{lines}" for (file, key), lines in add.items()),
            f"Start it:   {'' if folder == Path() else f'cd {folder} && '}agentweave up",
            "Then, in another terminal in that directory:",
            f"  agentweave call --target {agent.spiffe_id} --capability greet",
            "Change it:  agentweave dev, in place of up, takes up what you change, and breakpoint() works",
            "Its tests:  pytest, and agentweave authz test",
        )
    )
    facts = {
        "agent": str(agent.spiffe_id),
        "files": [str(path) for path in files],
        "add": {file: lines for (file, _), lines in add.items()},
    }
    print_result(facts, text, json_wanted=options.json)
    return ExitCode.DONE


def _trust_domain(asked: str | None, stack: _Stack | None) -> str:
    there = None if stack is None else stack.trust_domain
    if asked is not None and there is not None and asked != there:
        raise ConfigurationError(
            f"The stack there is of {there}, not of {asked}.",
            key="--trust-domain",
            hint="Leave --trust-domain out, or name another directory with --dir.",
        )
    return check_trust_domain(asked or there or _DEFAULT_DOMAIN)


# --- the name --------------------------------------------------------------------------------------------


def _check_name(name: str) -> None:
    """Refuse what can't be a name, and what as a module would hide another one. Raises ConfigurationError."""
    module = name.replace("-", "_")
    if not _NAME.fullmatch(name):
        why, hint = "", "Use up to 48 lower-case letters, digits, - and _, beginning with a letter."
    elif keyword.iskeyword(module):
        why, hint = f": {module!r} is a word of the Python language", f"Call it {name}-agent."
    elif taken := _taken(module):
        why, hint = f": its module {module}.py would hide {taken}", f"Call it {name}-agent."
    else:
        return
    raise ConfigurationError(f"{name!r} can't be an agent's name{why}.", key="NAME", hint=hint)


def _taken(module: str) -> str | None:
    """Say which module that is importable everywhere has this name; those of this directory don't count."""
    if module in sys.stdlib_module_names:
        return f"the module {module} of Python's standard library"
    if module in ("agentweave", "agentweave_bus"):
        return "this package"
    found = find_spec(module)
    if found is None or found.origin is None or isinstance(found.loader, NamespaceLoader):
        return None
    if Path(found.origin).is_relative_to(Path.cwd()) and "site-packages" not in found.origin:
        return None
    return f"the installed package {module}"


# --- the files -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NewAgent:
    """An agent to write: its name, which was checked, and its trust domain."""

    name: str
    trust_domain: str

    @property
    def module(self) -> str:
        """The name of its Python module."""
        return self.name.replace("-", "_")

    @property
    def spiffe_id(self) -> SpiffeID:
        """The identity that it will have."""
        return SpiffeID.of(self.trust_domain, "agent", self.name)

    def write(self, folder: Path, *, shared: bool = True) -> list[Path]:
        """Write the agent's files into ``folder``, and with ``shared`` those of a stack around it.

        Nothing that is there is changed.

        Raises:
            ConfigurationError: a file is there already; then nothing is written.

        """
        templates = {**_OWN, **_SHARED} if shared else _OWN
        texts = {
            folder / target.format(name=self.name, module=self.module): self.filled(template)
            for template, target in templates.items()
        }
        if there := [str(path) for path in texts if path.exists()]:
            raise ConfigurationError(
                f"{', '.join(there)}: there already, so nothing was written.",
                hint="Take another name, or name another directory with --dir.",
            )
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        return list(texts)

    def filled(self, template: str) -> str:
        """Return a template's text for this agent."""
        path = resources.files("agentweave_bus.cli") / "templates" / f"{template}.tmpl"
        logic = "".join(part.capitalize() for part in self.module.split("_") if part)
        return Template(path.read_text("utf-8")).substitute(
            name=self.name, module=self.module, domain=self.trust_domain, logic=logic
        )


@dataclass(frozen=True, slots=True)
class _Stack:
    """The stack that a directory holds already; its files are the user's, so they are not edited."""

    trust_domain: str
    client: str
    grants: Path | None

    @classmethod
    def of(cls, folder: Path) -> _Stack | None:
        file = folder / DEFAULT_STACK_FILE
        if not file.exists():
            return None
        config = load_stack(file)
        client = config.clients[0] if config.clients else "cli"
        return cls(config.trust_domain, client, grants_file(config.policy_source))

    def additions(self, agent: NewAgent) -> dict[tuple[str, str], str]:
        """Return what to add by hand: (file, key) to lines."""
        grants = self.grants.name if self.grants is not None else "its grants.yaml"
        return {
            (DEFAULT_STACK_FILE, "agents"): f"  - config: {agent.name}.yaml",
            (grants, "grants"): (
                f"  - caller: {SpiffeID.of(self.trust_domain, 'client', self.client)}\n"
                f"    callee: {agent.spiffe_id}\n"
                "    capabilities: [greet, health]"
            ),
        }
