"""As whom the command line acts: which configuration ``call`` and its like take.

``--config``, or ``--as`` (a client of the stack here), else ``AGENTWEAVE_CONFIG``, else what a running
``agentweave up`` has written in this directory. Directories above are not searched: whoever can write there
could choose an identity for you.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import socket
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from agentweave_bus.config import AgentConfig, load_config
from agentweave_bus.exceptions import ConfigurationError, UnreachableError
from agentweave_bus.identity.workload_api import socket_path_of

__all__ = ["STATE_DIR", "add_identity_arguments", "find_client_config", "is_held", "named_or_written"]

STATE_DIR: Final = Path(".agentweave")
_PROBE_SECONDS: Final = 1.0


def add_identity_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and ``--as``."""
    parser.add_argument(
        "--config", metavar="FILE", help="who calls; by default AGENTWEAVE_CONFIG, or what `up` wrote here"
    )
    parser.add_argument(
        "--as",
        dest="client",
        metavar="NAME",
        help="which of the clients of the stack here to be (default: cli)",
    )


def named_or_written() -> tuple[Path, bool]:
    """Return what ``AGENTWEAVE_CONFIG`` names and True, else where `up` writes the client's and False."""
    named = os.environ.get("AGENTWEAVE_CONFIG")
    return (Path(named), True) if named else (_written("cli"), False)


def _written(client: str) -> Path:
    return STATE_DIR / "clients" / f"{client}.yaml"


def find_client_config(options: argparse.Namespace) -> AgentConfig:
    """Return the configuration that the options choose.

    Raises:
        ConfigurationError: there is none, or it is wrong.
        UnreachableError: it is that of a stack which was killed.

    """
    path, named = _chosen(options)
    if named or path.is_file():
        config = load_config(path)
        _require_stack(path, config)
        return config
    known = sorted(one.stem for one in (STATE_DIR / "clients").glob("*.yaml"))
    if known:
        close = get_close_matches(path.stem, known, n=1)
        raise ConfigurationError(
            f"The stack here has no client {path.stem!r}.",
            key="--as",
            hint=(f"Did you mean {close[0]!r}? " if close else "") + f"It has: {', '.join(known)}.",
        )
    raise ConfigurationError(
        f"It is not said who calls: no --config, no AGENTWEAVE_CONFIG, and no {path}.",
        key="--config",
        hint="Start `agentweave up` in this directory, or name a configuration.",
    )


def _chosen(options: argparse.Namespace) -> tuple[Path, bool]:
    """Return which file it is, and whether somebody named it rather than that it is looked for."""
    if options.config and options.client:
        raise ConfigurationError(
            "Two identities are named: --config is one, and --as is a client of the stack here.",
            key="--as",
            hint="Leave one of them out.",
        )
    if options.config:
        return Path(options.config), True
    if options.client:
        return _written(options.client), False
    return named_or_written()


def _require_stack(path: Path, config: AgentConfig) -> None:
    """Refuse the file that a killed `agentweave up` left behind; waiting for it would be in vain."""
    lock = path.absolute().parent.parent / "lock"
    if path.absolute().parent.name != "clients" or not lock.exists() or is_held(lock):
        return
    if not _answers(config.identity.spiffe_endpoint):
        raise UnreachableError(
            f"the stack that wrote {path} ended without stopping: start `agentweave up` again"
        )


def _answers(endpoint: str) -> bool:
    """Say whether anybody listens on a Workload API's socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(socket_path_of(endpoint))
        except OSError:
            return False
    return True


def is_held(lock: Path) -> bool:
    """Say whether a running stack holds the lock of its state directory."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
