"""Which files an agent is made of: its module and what that imports, as far as it is the user's own.

It is read from the source, and nothing is imported for it: an import runs code, which may be what is wrong.
What is imported by a name that is made at run time is not seen.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NamedTuple

import agentweave_bus

__all__ = ["SourceFiles", "is_own"]

_FOREIGN: Final = (
    *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    Path(agentweave_bus.__file__).parent,
)


class _Located(NamedTuple):
    """Where a module is: its file, and the directories in which a package's modules are looked for."""

    file: Path | None
    folders: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class _Read:
    stamp: tuple[int, int]
    imports: frozenset[str]


def is_own(file: Path) -> bool:
    """Say whether a file is the user's: neither Python's, nor installed, nor this package's."""
    return not any(file.is_relative_to(folder) for folder in _FOREIGN)


class SourceFiles:
    """Finds the files of agents; what was read is kept until it changes."""

    def __init__(self) -> None:
        self._read: dict[Path, _Read] = {}

    def of(self, module: str, folder: Path) -> dict[str, Path]:
        """Return the file of an agent's ``module``, which may lie in ``folder``, and of all that it imports.

        By the modules' names. A file that can't be parsed counts with what it imported when it last could.
        There are none where the module is not found.
        """
        path = _search_path(folder)
        found: dict[str, Path] = {}
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            for name in _with_packages(waiting.pop()):
                if name in seen:
                    continue
                seen.add(name)
                where = _located(name, path)
                if where is None or where.file is None or not is_own(where.file):
                    continue
                found[name] = where.file
                waiting += self._imports(where.file, name, is_package=bool(where.folders))
        return found

    def _imports(self, file: Path, name: str, *, is_package: bool) -> frozenset[str]:
        known = self._read.get(file)
        try:
            status = file.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if known is not None and known.stamp == stamp:
                return known.imports
            package = name if is_package else name.rpartition(".")[0]
            imports = frozenset(_imported(ast.parse(file.read_bytes()), package))
        except (OSError, SyntaxError, ValueError):
            return frozenset() if known is None else known.imports
        self._read[file] = _Read(stamp, imports)
        return imports


def _search_path(folder: Path) -> tuple[Path, ...]:
    """Return where a worker looks: in its working directory, what is installed, beside its configuration."""
    return (Path.cwd(), *(Path(entry) for entry in sys.path if entry), folder)


def _with_packages(name: str) -> Iterator[str]:
    """Yield a module's name after those of the packages around it."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _located(name: str, path: Iterable[Path]) -> _Located | None:
    top, *rest = name.split(".")
    where = _in_folders(top, path) or _installed_by_hook(top)
    for part in rest:
        if where is None:
            return None
        where = _in_folders(part, where.folders)
    return where


def _in_folders(name: str, folders: Iterable[Path]) -> _Located | None:
    """Find a module by its last name, as the path-based finder does."""
    portions = []
    for folder in folders:
        package = folder / name
        if (init := package / "__init__.py").is_file():
            return _Located(init, (package,))
        if (file := folder / f"{name}.py").is_file():
            return _Located(file)
        if package.is_dir():
            portions.append(package)
    return _Located(None, tuple(portions)) if portions else None


def _installed_by_hook(name: str) -> _Located | None:
    """Find what a hook makes importable, as an editable installation does. The top is not imported by it."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    folders = spec.submodule_search_locations or ()
    return _Located(Path(spec.origin), tuple(Path(one) for one in folders))


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the names that may be modules, wherever they are imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, package)
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")


def _base(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    around = parts[: len(parts) - node.level + 1]
    return ".".join((*around, *([node.module] if node.module else [])))
