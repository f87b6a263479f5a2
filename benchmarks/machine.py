"""What was measured, and on what."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.embedded.nats_server import find_nats_server

__all__ = ["describe"]

_PACKAGES: Final = (
    "nats-py",
    "uvloop",
    "cryptography",
    "wasmtime",
    "pydantic",
    "faststream",
    "a2a-sdk",
    "taskiq",
    "taskiq-nats",
    "uvicorn",
    "httpx",
)


def describe() -> dict[str, str]:
    """Return names and values, to be printed as they are."""
    return dict(_facts())


def _facts() -> Iterator[tuple[str, str]]:
    yield "processor", f"{os.cpu_count()} x {_first('/proc/cpuinfo', 'model name') or platform.machine()}"
    yield "memory", f"{int(_first('/proc/meminfo', 'MemTotal').split()[0] or 0) / 1e6:.1f} GB"
    # Major and minor: what follows says whose build it is.
    release = re.match(r"\d+\.\d+", platform.release())
    yield "system", f"{platform.system()} {release[0] if release else ''}".strip()
    yield "load before", f"{os.getloadavg()[0]:.2f} (processes that wanted to run in the last minute)"
    yield "revision", _said("git", "describe", "--always", "--dirty")
    yield "python", platform.python_version()
    yield "nats-server", ".".join(map(str, find_nats_server().version))
    opa = find_opa()
    if opa is not None:
        yield "opa", _said(str(opa), "version").partition("\n")[0].removeprefix("Version: ")
    for name in _PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _first(file: str, key: str) -> str:
    for line in Path(file).read_text().splitlines():
        if line.startswith(key):
            return " ".join(line.partition(":")[2].split())
    return ""


def _said(*command: str) -> str:
    program = shutil.which(command[0])
    if program is None:
        return "unknown"
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False, timeout=20)  # noqa: S603 - git and opa
    return done.stdout.strip() or "unknown"
