"""The machine: versions, disk, files that others may change, ports."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from agentweave_bus.authz.policy_source import OPA_VERSION, find_opa
from agentweave_bus.cli.checks.finding import Finding, failed, ok, warning
from agentweave_bus.config.security import in_url
from agentweave_bus.embedded.nats_server import find_nats_server
from agentweave_bus.exceptions import ConfigurationError

__all__ = [
    "BROKER_FLOORS",
    "audit_findings",
    "broker_version_finding",
    "disk_finding",
    "opa_finding",
    "open_to_others",
    "port_finding",
    "tool_findings",
    "version_findings",
]

BROKER_FLOORS: Final = ((2, 12, 14), (2, 14, 4))
"""The oldest good nats-server of its release line, and of all lines from there on."""

_PYTHON_FLOOR: Final = (3, 11)
_NATS_PY_FLOOR: Final = (2, 11)
_LITTLE_BYTES: Final = 1024**3
_NONE_BYTES: Final = 64 * 1024**2
_LITTLE_SHARE: Final = 0.03
_TOOL_SECONDS: Final = 10.0
_PROBE_SECONDS: Final = 1.0


# --- versions --------------------------------------------------------------------------------------------


def numbers_of(text: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: ``v2.14.4-rc1`` is 2, 14, 4."""
    plain = text.strip().removeprefix("v").partition("-")[0].partition("+")[0]
    found = []
    for part in plain.split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def version_findings(
    python: tuple[int, ...] = tuple(sys.version_info[:3]), nats_py: str | None = None
) -> Iterator[Finding]:
    """Judge the interpreter and the client library."""
    found = nats_py if nats_py is not None else _installed("nats-py")
    said = f"Python {_dotted(python)}, nats-py {found or 'none'}"
    if python < _PYTHON_FLOOR:
        yield failed(f"{said}: Python is too old", f"Use Python {_dotted(_PYTHON_FLOOR)} or later.")
    elif found is None or numbers_of(found) < _NATS_PY_FLOOR:
        yield failed(f"{said}: nats-py is too old", f"pip install 'nats-py>={_dotted(_NATS_PY_FLOOR)}'")
    else:
        yield ok(said)


def broker_version_finding(text: str) -> Finding:
    """Judge the version that a broker names."""
    found = numbers_of(text)
    line, later = BROKER_FLOORS
    if found >= later or (line <= found and found[:2] == line[:2]):
        return ok(f"nats-server {text}")
    return failed(
        f"nats-server {text} is too old",
        f"Install {_dotted(line)} of its line, or {_dotted(later)} or later: older ones have known faults.",
    )


def tool_findings() -> Iterator[Finding]:
    """Say which nats-server a stack here would start."""
    try:
        binary = find_nats_server()
    except ConfigurationError as error:
        yield failed(str(error), "")
    else:
        yield ok(f"nats-server {_dotted(binary.version)} ({binary.path})")


def opa_finding(*, needed: bool) -> Finding:
    """Say which ``opa`` there is; Rego of one's own needs one."""
    opa = find_opa()
    if opa is None and needed:
        return failed(
            "Rego of your own has to be compiled, and there is no opa",
            f"Put OPA {OPA_VERSION} on PATH (make tools builds it), or compile the directory elsewhere"
            " (policy.wasm and policy.lock).",
        )
    if opa is None:
        return ok("no opa, and nothing here needs one")
    try:
        done = subprocess.run(  # noqa: S603 - the user's own opa, named by its path
            [opa, "version"], capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return failed(f"{opa} does not run: {error}", "Replace it, or take it off PATH.")
    found = done.stdout.partition("\n")[0].removeprefix("Version: ").strip()
    if numbers_of(found)[:2] < numbers_of(OPA_VERSION)[:1]:
        return failed(f"opa {found or 'of no version'} ({opa}) is too old", f"Install OPA {OPA_VERSION}.")
    if found != OPA_VERSION:
        return warning(f"opa {found} ({opa})", f"Policies here are tested with {OPA_VERSION}.")
    return ok(f"opa {found} ({opa})")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _dotted(found: tuple[int, ...]) -> str:
    return ".".join(map(str, found))


# --- disk and files --------------------------------------------------------------------------------------


def audit_findings(log: Path) -> Iterator[Finding]:
    """Try to write where an audit log lies, which without it nothing may run, and judge the disk."""
    folder = log.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        if log.exists():
            with log.open("ab"):
                pass
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".agentweave-doctor-") as file:
            file.write(b"\0" * 4096)
            file.flush()
    except OSError as error:
        yield failed(
            f"the audit log {log} can't be written: {error.strerror}",
            "Name another place in authorization.audit.destination, or make this one writable: a call whose"
            " decision can't be recorded is refused.",
        )
        return
    usage = shutil.disk_usage(folder)
    yield disk_finding(log, free=usage.free, total=usage.total)


def disk_finding(log: Path, *, free: int, total: int) -> Finding:
    """Judge how much room an audit log has, in bytes."""
    said = f"{log}: {free / 1024**2:,.0f} MiB are free"
    advice = "Make room: when the disk is full every call is refused, because it can't be recorded."
    if free < _NONE_BYTES:
        return failed(said, advice)
    if free < _LITTLE_BYTES or free < total * _LITTLE_SHARE:
        return warning(said, advice)
    return ok(said)


def open_to_others(path: Path, *, secret: bool = False) -> Finding | None:
    """Say that others may change ``path`` (or, if it is ``secret``, read it); None if they may not."""
    try:
        found = path.stat()
    except OSError:
        return None
    mode = stat.S_IMODE(found.st_mode)
    if secret and mode & 0o077:
        fix = "700" if stat.S_ISDIR(found.st_mode) else "600"
        return failed(f"{path} may be read by other users (mode {mode:o})", f"chmod {fix} {path}")
    sticky = stat.S_ISDIR(found.st_mode) and mode & stat.S_ISVTX
    if mode & 0o022 and not sticky:
        return failed(f"{path} may be changed by other users (mode {mode:o})", f"chmod go-w {path}")
    if found.st_uid not in {0, os.geteuid()}:
        return warning(f"{path} belongs to the user {found.st_uid}, who may change it", f"chown it: {path}")
    return None


# --- ports -----------------------------------------------------------------------------------------------


def port_finding(key: str, host: str, port: int, *, mine: str = "") -> Finding:
    """Try to listen on ``port``. One that answers health checks as ``mine`` is taken by the agent itself."""
    place = f"{host}:{port} ({key})"
    if port == 0:
        return ok(f"{key} takes a free port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if mine and mine in _health(host, port):
                return ok(f"{place} is served by {mine}")
            return failed(
                f"{place} can't be had: {error.strerror}",
                f"Set {key} to another port, or to 0 for a free one.",
            )
    return ok(f"{place} is free")


def _health(host: str, port: int) -> str:
    try:
        with urllib.request.urlopen(
            f"http://{in_url(host)}:{port}/healthz", timeout=_PROBE_SECONDS
        ) as answer:
            return str(answer.read(4096).decode(errors="replace"))
    except (OSError, ValueError, urllib.error.URLError):
        return ""
