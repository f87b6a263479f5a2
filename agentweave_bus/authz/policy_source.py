"""From Rego to WebAssembly: what is compiled, how, and what may not be.

**One source of truth.** The repository's ``policies/`` holds the shipped Rego, its tests, and the
``policy.wasm`` that :func:`compile_policies` makes of it and a test compares byte for byte.
``agentweave_bus/authz/shipped`` is a link to that directory: a checkout reads through it, and a wheel
holds copies of what it shows. Nothing is kept twice.

**Own Rego** in a user's directory is compiled together with the shipped packages (but for those that the
user defines anew) by the ``opa`` binary, into a cache that is keyed by the content of every file. So it
is compiled once. A machine without ``opa`` takes a directory that :func:`precompile` has prepared.

**Standing rules** are checked when they are compiled: ``opa deps`` must show that the rule reaches only
what its reduced input holds, and the rule compiled by itself must not ask the host for the clock. A
foreign ``policy.wasm`` shows neither, so its standing rules are never asked. This check is the second
net: an engine asks standing rules with the reduced input only, and without a clock.

Runs ``opa`` as a process. Knows no engine.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agentweave_bus.authz.decision import STANDING_CONTEXT_KEYS, STANDING_KEYS, STANDING_LINK_KEYS
from agentweave_bus.authz.host_builtins import CLOCK_BUILTINS
from agentweave_bus.authz.policy_data import MAX_FILE_BYTES, read_bytes
from agentweave_bus.exceptions import PolicyLoadError

if TYPE_CHECKING:
    from agentweave_bus.authz.wasm_module import PolicyModule

__all__ = [
    "OPA_VERSION",
    "SHIPPED",
    "CompiledPolicy",
    "checked_sources",
    "compile_policies",
    "default_cache",
    "find_opa",
    "load_policy",
    "precompile",
]

OPA_VERSION: Final = "1.21.3"
"""The compiler of the shipped WebAssembly, whose bytes depend on it."""

SHIPPED: Final = Path(__file__).parent / "shipped"
"""The shipped policies, compiled and as source."""

_SHIPPED_STANDING: Final = frozenset(
    {"admin/authz", "agentweave/grants", "gateway/authz", "inventory/authz", "order/authz", "user/authz"}
)
"""The shipped packages with a standing rule; a test compares it with what is compiled."""

_WASM: Final = "policy.wasm"
_LOCK: Final = "policy.lock"
_RULES: Final = ("allow", "decision", "standing")
_COMPILE_SECONDS: Final = 60.0
_MAX_COMPLAINT: Final = 4000
_STANDING_INPUT: Final = (
    *((name,) for name in STANDING_KEYS),
    *(("context", name) for name in STANDING_CONTEXT_KEYS),
)


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """A policy as WebAssembly.

    Attributes:
        wasm: the module.
        standing_checked: its standing rules have passed the check and may be asked.

    """

    wasm: bytes
    standing_checked: bool


def find_opa() -> Path | None:
    """Return the ``opa`` binary: of ``$AGENTWEAVE_TOOLS``, of the tools cache, or of ``PATH``."""
    for folder in (os.environ.get("AGENTWEAVE_TOOLS"), str(Path.home() / ".cache/agentweave/tools"), None):
        found = None if folder == "" else shutil.which("opa", path=folder)
        if found:
            return Path(found)
    return None


def default_cache() -> Path:
    """Return where compiled policies are kept: below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentweave" / "policies"


def load_policy(source: Path | None, cache: Path) -> CompiledPolicy:
    """Return the compiled policy of ``source``: shipped, precompiled, from the cache, or compiled now.

    A directory without Rego (or one grants file, or None) gets the shipped policy.

    Raises:
        PolicyLoadError: it does not compile, breaks a rule for policies, or needs an ``opa`` binary
            that is not there.

    """
    if source is None or not source.is_dir():
        return _shipped()
    sources = _rego_files(source)
    if not sources:
        return CompiledPolicy(read_bytes(source / _WASM), False) if (source / _WASM).exists() else _shipped()
    if sources == _rego_files(SHIPPED):
        return _shipped()
    digest = _digest(sources | _shipped_as_library())
    known = _locked(source, digest) or _cached(cache / f"{digest}.wasm")
    return CompiledPolicy(known or _compile_own(source, sources, cache / f"{digest}.wasm"), True)


def precompile(directory: Path) -> None:
    """Compile a user's ``directory`` and put ``policy.wasm`` and ``policy.lock`` into it.

    The lock names the digests of sources and module. As long as they hold, whoever loads the directory
    needs no ``opa``.

    Raises:
        PolicyLoadError: as for :func:`load_policy`.

    """
    sources = _rego_files(directory)
    wasm = _compile_merged(directory, sources)
    lock = {"sources": _digest(sources | _shipped_as_library()), "wasm": hashlib.sha256(wasm).hexdigest()}
    (directory / _WASM).write_bytes(wasm)
    (directory / _LOCK).write_text(json.dumps(lock, indent=2) + "\n", encoding="utf-8")


def compile_policies(directory: Path) -> bytes:
    """Compile every package of ``directory`` as one would by hand, and return the WebAssembly.

    It runs ``opa build -t wasm --ignore '*_test.rego' -e … .`` inside the directory, with one ``-e`` for
    each ``allow``, ``decision`` and ``standing`` rule in the order of their paths, and checks the standing
    rules. (Tests have to be ignored: OPA compiles whatever refers to an entrypoint, tests too, and
    makes entrypoints of them.)

    Raises:
        PolicyLoadError: there is no ``opa``, or it does not compile; the message is the compiler's.

    """
    sources = _rego_files(directory)
    entrypoints = _entrypoints(sources)
    if not entrypoints:
        raise PolicyLoadError(f"{directory} defines no allow, decision or standing rule in any package")
    _check_standing_rules(sources, [path for path in entrypoints if path.endswith("/standing")])
    return _build(directory, entrypoints)


def checked_sources(source: Path | None) -> tuple[dict[str, bytes], frozenset[str]]:
    """Return the merged Rego of ``source`` by file name, and the packages with a checked standing rule.

    Raises:
        PolicyLoadError: as for :func:`load_policy`.

    """
    own = {} if source is None or not source.is_dir() else _rego_files(source)
    if source is None or not own or own == _rego_files(SHIPPED):
        return _rego_files(SHIPPED), _SHIPPED_STANDING
    wasm = _compile_merged(source, own)
    rules = (path.rpartition("/") for path in _rules_of(wasm))
    return _merged(own), frozenset(package for package, _, rule in rules if rule == "standing")


# --- where a policy comes from -------------------------------------------------------------------------


def _shipped() -> CompiledPolicy:
    return CompiledPolicy(read_bytes(SHIPPED / _WASM), True)


def _rego_files(directory: Path) -> dict[str, bytes]:
    """Return the policy sources below ``directory`` by their relative path; tests and dotfiles apart."""
    paths = sorted(path.relative_to(directory) for path in directory.rglob("*.rego"))
    kept = (path for path in paths if not path.name.endswith("_test.rego"))
    return {
        path.as_posix(): read_bytes(directory / path)
        for path in kept
        if not any(part.startswith(".") for part in path.parts)
    }


def _shipped_as_library() -> dict[str, bytes]:
    return {f"agentweave_shipped/{name}": raw for name, raw in _rego_files(SHIPPED).items()}


def _digest(sources: dict[str, bytes]) -> str:
    total = hashlib.sha256()
    for name, raw in sorted(sources.items()):
        total.update(f"{len(name.encode())}:{name}{len(raw)}:".encode() + raw)
    return total.hexdigest()


def _locked(directory: Path, digest: str) -> bytes | None:
    if not (directory / _LOCK).is_file() or not (directory / _WASM).is_file():
        return None
    wasm = read_bytes(directory / _WASM)
    try:
        lock = json.loads(read_bytes(directory / _LOCK))
    except (ValueError, RecursionError) as error:
        raise PolicyLoadError(f"{directory / _LOCK} is malformed; compile the directory again") from error
    fits = lock == {"sources": digest, "wasm": hashlib.sha256(wasm).hexdigest()}
    return wasm if fits else None


def _cached(path: Path) -> bytes | None:
    """Return a module compiled earlier, unless others than its owner could have put it there."""
    try:
        folder, file = path.parent.stat(), path.stat()
    except OSError:
        return None
    own = os.geteuid()
    if {folder.st_uid, file.st_uid} != {own} or (folder.st_mode | file.st_mode) & 0o022:
        return None
    return read_bytes(path)


def _compile_own(directory: Path, sources: dict[str, bytes], target: Path) -> bytes:
    wasm = _compile_merged(directory, sources)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        file.write(wasm)
    Path(file.name).replace(target)
    return wasm


# --- compiling -----------------------------------------------------------------------------------------


def _compile_merged(directory: Path, sources: dict[str, bytes]) -> bytes:
    """Compile the user's sources, with the shipped packages beside them."""
    with tempfile.TemporaryDirectory(prefix="agentweave-policy-") as folder:
        try:
            _check_syntax(Path(folder), sources)
            _write_sources(Path(folder), _merged(sources))
            return compile_policies(Path(folder))
        except PolicyLoadError as error:
            raise PolicyLoadError(f"{directory}: {error}") from error


def _check_syntax(folder: Path, sources: dict[str, bytes]) -> None:
    """Have mistakes named by file and line: parsed as data, they would not be."""
    _write_sources(folder, sources)
    for name in sources:
        _run_opa(folder, "parse", "--format", "json", name)


def _merged(own: dict[str, bytes]) -> dict[str, bytes]:
    """Return the user's sources with the shipped packages that they do not define anew."""
    library = _shipped_as_library()
    modules = _parse(own | library)
    taken = {_package_of(modules[name]) for name in own}
    return own | {name: raw for name, raw in library.items() if _package_of(modules[name]) not in taken}


def _write_sources(folder: Path, sources: dict[str, bytes]) -> None:
    for name, raw in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


def _entrypoints(sources: dict[str, bytes]) -> list[str]:
    found = {
        f"{_package_of(module)}/{rule['head']['name']}"
        for module in _parse(sources).values()
        for rule in module.get("rules", ())
        if rule["head"].get("name") in _RULES and "args" not in rule["head"]
    }
    return sorted(found)


def _package_of(module: dict[str, Any]) -> str:
    return _path(module["package"]["path"][1:])


def _parse(sources: dict[str, bytes]) -> dict[str, Any]:
    """Return the syntax tree of each source, with one run of the compiler."""
    texts = {name: raw.decode(errors="replace") for name, raw in sources.items()}
    query = "{name: rego.parse_module(name, text) | some name, text in input}"
    with tempfile.TemporaryDirectory(prefix="agentweave-policy-") as folder:
        (Path(folder) / "sources.json").write_text(json.dumps(texts), encoding="utf-8")
        arguments = ("--format", "json", "--strict-builtin-errors", "--input", "sources.json", query)
        answer = json.loads(_run_opa(Path(folder), "eval", *arguments))
    modules: dict[str, Any] = answer["result"][0]["expressions"][0]["value"]
    return modules


def _path(terms: list[dict[str, Any]]) -> str:
    return "/".join(str(term["value"]) for term in terms)


def _build(directory: Path, entrypoints: list[str]) -> bytes:
    chosen = [part for entrypoint in entrypoints for part in ("-e", entrypoint)]
    with tempfile.TemporaryDirectory(prefix="agentweave-policy-") as folder:
        bundle = Path(folder) / "bundle.tar.gz"
        _run_opa(directory, "build", "-t", "wasm", "--ignore", "*_test.rego", *chosen, "-o", str(bundle), ".")
        return _member(bundle.read_bytes(), _WASM)


def _member(bundle: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(bundle), mode="r:gz") as archive:
        file = archive.extractfile(f"/{name}")
        if file is None:
            raise PolicyLoadError(f"the compiled bundle has no {name}")
        return file.read(MAX_FILE_BYTES + 1)


def _run_opa(directory: Path, *arguments: str) -> bytes:
    opa = find_opa()
    if opa is None:
        raise PolicyLoadError(
            "compiling Rego needs the 'opa' binary, and there is none: put OPA "
            f"{OPA_VERSION} on PATH ('make tools' builds it), or load a directory that was compiled "
            "before (with policy.wasm and policy.lock). Changing grants.yaml needs no compiler."
        )
    try:
        done = subprocess.run(  # noqa: S603 - a fixed program, arguments are ours
            [opa, *arguments], cwd=directory, capture_output=True, timeout=_COMPILE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PolicyLoadError(f"{opa} could not be run: {error}") from error
    if done.returncode != 0:
        raise PolicyLoadError(f"opa {arguments[0]} says: {_complaint(done)}")
    return done.stdout


def _complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    """Return what the compiler said, as ``file:line: message`` where it said it in JSON."""
    text = (done.stderr or done.stdout).decode(errors="replace").strip()
    try:
        errors = json.loads(text)["errors"]
        lines = [f"{at['location']['file']}:{at['location']['row']}: {at['message']}" for at in errors]
    except (ValueError, KeyError, TypeError):
        return text[:_MAX_COMPLAINT]
    return "\n".join(lines)[:_MAX_COMPLAINT]


# --- standing rules ------------------------------------------------------------------------------------


def _check_standing_rules(sources: dict[str, bytes], entrypoints: list[str]) -> None:
    """Refuse a standing rule that depends on what its answer would not hold for.

    In a folder without tests: the compiler takes in whatever refers to a rule.
    """
    if not entrypoints:
        return
    with tempfile.TemporaryDirectory(prefix="agentweave-policy-") as folder:
        _write_sources(Path(folder), sources)
        if _moving_input(Path(folder), entrypoints) is None:
            _check_clock(_build(Path(folder), entrypoints))
            return
        for entrypoint in entrypoints:  # which one it is
            moving = _moving_input(Path(folder), [entrypoint])
            if moving is not None:
                raise PolicyLoadError(_MOVING.format(rule=_reference(entrypoint), moving=moving))


_MOVING: Final = (
    "{rule} depends on {moving}, which differs from one request to the next; a standing answer may depend "
    "on caller, callee, action, direction, kind, transport, scope, principal, and on iss, aud, cap and kind "
    "of via only"
)


def _moving_input(folder: Path, entrypoints: list[str]) -> str | None:
    """Return a part of the input that the rules reach and that a standing answer may not depend on."""
    query = "; ".join(_reference(entrypoint) for entrypoint in entrypoints)
    found = json.loads(_run_opa(folder, "deps", "--format", "json", "-d", ".", query))
    for base in found.get("base", ()):
        if base[0]["value"] == "input" and not _stands_still(base[1:]):
            return _path(base).replace("/", ".")
    return None


def _reference(entrypoint: str) -> str:
    package, _, rule = entrypoint.rpartition("/")
    return "data" + "".join(f'["{part}"]' for part in package.split("/")) + f".{rule}"


def _check_clock(wasm: bytes) -> None:
    clock = sorted(CLOCK_BUILTINS & _host_functions(wasm))
    if clock:
        raise PolicyLoadError(f"a standing rule reads the clock ({clock[0]}); a standing answer may not")


def _stands_still(terms: list[dict[str, Any]]) -> bool:
    path = tuple(term["value"] if term["type"] == "string" else None for term in terms)
    if path[:2] == ("context", "via"):
        # Behind a variable (via[_]) OPA names no key: there, the reduced input alone says what is seen.
        return len(path) < 4 or path[3] in STANDING_LINK_KEYS  # noqa: PLR2004 - context, via, index, key
    return any(path[: len(allowed)] == allowed for allowed in _STANDING_INPUT)


def _host_functions(wasm: bytes) -> set[str]:
    return set(_inspected(wasm).builtins.values())


def _rules_of(wasm: bytes) -> list[str]:
    return sorted(_inspected(wasm).entrypoints)


def _inspected(wasm: bytes) -> PolicyModule:
    from agentweave_bus.authz.wasm_module import ModuleLimits, PolicyModule  # noqa: PLC0415 - wasmtime is optional

    return PolicyModule(wasm, ModuleLimits())
