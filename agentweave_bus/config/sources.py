"""Where settings come from, and which source wins.

From weakest to strongest: the defaults, ``SPIFFE_ENDPOINT_SOCKET`` (for that one key), the file, the
variables ``AGENTWEAVE_<SECTION>__<KEY>`` and the ``overrides`` of the program. No setting is read from
a variable anywhere else. Other modules read where this machine keeps things (``AGENTWEAVE_TOOLS``,
``XDG_CACHE_HOME``, ``XDG_RUNTIME_DIR``), secrets (``secrets.py``), and by what a worker tells
``agentweave up`` that it is ready.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from agentweave_bus.config.document import Document, KeyPath, parse_value, read_document
from agentweave_bus.config.fields import Environment
from agentweave_bus.config.problems import Origins
from agentweave_bus.exceptions import ConfigurationError

__all__ = ["Settings", "choose_environment", "choose_path"]

PREFIX: Final = "AGENTWEAVE_"
SEPARATOR: Final = "__"
# A stack's settings have a prefix of their own: its processes inherit its environment, and a
# variable must not mean a key of the stack in one and an unknown key of an agent in the other.
STACK_PREFIX: Final = "AGENTWEAVE_STACK__"
_ENVIRONMENTS: Final = ("production", "development")


def choose_environment(argument: str | None, variables: Mapping[str, str]) -> Environment:
    """Return the environment: the argument's, else ``AGENTWEAVE_ENV``'s, else production.

    Raises:
        ConfigurationError: it is neither ``production`` nor ``development``.

    """
    source, name = ("--env", argument) if argument else ("AGENTWEAVE_ENV", variables.get("AGENTWEAVE_ENV"))
    if not name or name == "production":
        return "production"
    if name == "development":
        return "development"
    close = difflib.get_close_matches(name, _ENVIRONMENTS, n=1, cutoff=0.3)
    raise ConfigurationError(
        f"{source}: {name!r} is no environment.",
        key=source,
        hint=f"Did you mean {close[0]!r}?" if close else "Use production or development.",
    )


def choose_path(argument: str | Path | None, variables: Mapping[str, str]) -> Path | None:
    """Return the file to read: the argument, else ``AGENTWEAVE_CONFIG``, else None."""
    if argument is not None:
        return Path(argument)
    named = variables.get("AGENTWEAVE_CONFIG")
    return Path(named) if named else None


@dataclass(slots=True)
class Settings:
    """The merged tree of settings, and where each came from."""

    tree: dict[str, Any] = field(default_factory=dict)
    file: str | None = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    names: dict[KeyPath, str] = field(default_factory=dict)

    @property
    def origins(self) -> Origins:
        """Where each setting came from, for messages."""
        return Origins(self.file, self.lines, self.names)

    def read_file(self, path: Path, file_keys: Iterable[KeyPath]) -> None:
        """Take over a file; ``file_keys`` name files that are relative to where it lies."""
        document: Document = read_document(path)
        self.tree = document.value
        self.file, self.lines = document.name, document.lines
        for key in file_keys:
            _resolve(self.tree, key, path.absolute().parent)

    def read_variables(self, variables: Mapping[str, str]) -> None:
        """Take over every ``AGENTWEAVE_<SECTION>__<KEY>``; values are YAML."""
        for name in sorted(variables):
            if name.startswith(PREFIX) and SEPARATOR in name and not name.startswith(STACK_PREFIX):
                self._read_variable(name, name.removeprefix(PREFIX), variables[name])

    def read_stack_variables(self, variables: Mapping[str, str]) -> None:
        """Take over every ``AGENTWEAVE_STACK__<KEY>``; values are YAML."""
        for name in sorted(variables):
            if name.startswith(STACK_PREFIX):
                self._read_variable(name, name.removeprefix(STACK_PREFIX), variables[name])

    def _read_variable(self, name: str, rest: str, text: str) -> None:
        path = tuple(rest.lower().split(SEPARATOR))
        if not all(path):
            raise ConfigurationError(f"{name}: a part of the name is empty.", key=name, hint="Remove it.")
        self.put(path, parse_value(text, name), name)

    def read_overrides(self, overrides: Mapping[str, Any]) -> None:
        """Take over what the program gives: nested mappings, or dotted names at the top."""
        for name, value in overrides.items():
            self._override(tuple(name.split(".")), value)

    def _override(self, path: tuple[str, ...], value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, child in value.items():
                self._override((*path, str(key)), child)
        else:
            self.put(path, value, "overrides")

    def put(self, path: tuple[str, ...], value: Any, origin: str) -> None:
        """Set one key; what was there before is replaced."""
        *sections, key = path
        tree = self.tree
        for section in sections:
            if not isinstance(tree.get(section), dict):
                tree[section] = {}
            tree = tree[section]
        tree[key] = value
        self.names[path] = origin


def _resolve(tree: Any, key: KeyPath, folder: Path) -> None:
    """Make the file names at ``key`` absolute; ``*`` stands for every item of a mapping or list."""
    head, *rest = key
    if isinstance(tree, dict):
        names: Iterable[Any] = list(tree) if head == "*" else [head] if head in tree else []
    else:
        names = range(len(tree)) if head == "*" and isinstance(tree, list) else []
    for name in names:
        if rest:
            _resolve(tree[name], tuple(rest), folder)
        elif isinstance(tree[name], str):
            tree[name] = str(folder / tree[name])
