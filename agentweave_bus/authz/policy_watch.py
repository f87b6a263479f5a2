"""Following a policy directory: when a file in it changes, everything is read again, or nothing is.

A change is seen by names, sizes, times and inodes of the files. Contents are read only then, and only
when nothing has changed for a moment: half of a file can allow more than the whole. What can't be loaded
leaves the engine and the grants as they were, and is not tried again until something changes again.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio.to_thread

from agentweave_bus.authz.grants import Grants
from agentweave_bus.authz.policy_data import grants_file
from agentweave_bus.exceptions import AgentWeaveError, PolicyLoadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["PolicyWatch"]

QUIET_SECONDS: Final = 0.05
"""How long the files must have stayed the same before they are read."""

_LOOKS: Final = 20
"""How often that is waited for; files that still change then are left for the next time."""

_SUFFIXES: Final = frozenset({".rego", ".yaml", ".yml", ".json", ".wasm", ".lock"})

_log = logging.getLogger(__name__)

_Fingerprint: TypeAlias = "tuple[tuple[str, int, int, int], ...]"


class PolicyWatch:
    """The policy directory (or one grants file) of an agent, read once by the constructor.

    Args:
        source: the directory or file.
        load: makes the engine take it (``EmbeddedEngine.load``): both policy and data or, with an
            exception, neither. None for engines that get their policy elsewhere.

    Raises:
        PolicyLoadError: the engine refused it.
        ConfigurationError: the grants are malformed.

    """

    def __init__(self, source: Path, load: Callable[[Path], object] | None = None) -> None:
        self._source = source
        self._load = load
        self._turn = threading.Lock()
        self._seen = self._fingerprint()
        self._failure: AgentWeaveError | None = None
        self._grants = self._read()

    @property
    def grants(self) -> Grants | None:
        """The grants in use; None if the directory has none."""
        return self._grants

    async def refresh(self, *, force: bool = False) -> bool:
        """Look for a change and follow it; ``force`` reads everything anyway. Return whether it did.

        Raises:
            PolicyLoadError: the engine refused what it found, now or before, or failed over it.
            ConfigurationError: the grants are malformed.

        """
        return await anyio.to_thread.run_sync(self._refresh, force)

    def _refresh(self, force: bool) -> bool:
        with self._turn:  # else what was read first could be taken last, and stay
            return self._look(force)

    def _look(self, force: bool) -> bool:
        found = self._fingerprint()
        if found == self._seen and not force:
            if self._failure is not None:
                raise self._failure.with_traceback(None)  # else it would grow each time
            return False
        settled = found if force else self._settled(found)
        if settled is None:
            return False
        self._seen = settled
        try:
            self._grants = self._read()
        except AgentWeaveError as problem:
            self._failure = problem
            raise
        except Exception as problem:
            _log.exception("reading %s failed in a way that nobody foresaw", self._source)
            self._failure = PolicyLoadError(f"{self._source} can't be read ({type(problem).__name__})")
            raise self._failure from problem
        self._failure = None
        return True

    def _read(self) -> Grants | None:
        path = grants_file(self._source)
        grants = None if path is None else Grants.load(path)
        if self._load is not None:
            self._load(self._source)
        return grants

    def _settled(self, found: _Fingerprint) -> _Fingerprint | None:
        """Wait until the files stop changing; None if they don't."""
        for _ in range(_LOOKS):
            time.sleep(QUIET_SECONDS)
            before, found = found, self._fingerprint()
            if found == before:
                return found
        return None

    def _fingerprint(self) -> _Fingerprint:
        files = sorted(self._source.rglob("*")) if self._source.is_dir() else [self._source]
        return tuple(entry for path in files if (entry := _stamp(path)) is not None)


def _stamp(path: Path) -> tuple[str, int, int, int] | None:
    if path.suffix not in _SUFFIXES:
        return None
    try:
        status = path.stat()
    except OSError:
        return None
    return str(path), status.st_mtime_ns, status.st_size, status.st_ino
