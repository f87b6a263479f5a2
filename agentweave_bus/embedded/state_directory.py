"""The state directory of an embedded stack: held by one process, cleared after one that was killed."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.supervisor.control_socket import SOCKET_NAME

__all__ = ["CLIENT_HEAD", "StateLock", "keep_out_of_git", "locked"]

_log = logging.getLogger(__name__)

CLIENT_HEAD: Final = "# Written by `agentweave up`"
"""How a client's file begins that a stack has written."""

_STATE: Final = frozenset(
    {"audit", "authorities", "authority", "broker", "clients", "lock", "supervisor.lock", SOCKET_NAME}
)
_IGNORED: Final = ".gitignore"
_SOCKETS_PREFIX: Final = "agentweave-"  # as embedded/stack.py calls them
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


class StateLock:
    """The held lock of a state directory.

    Its file says who holds it, where that one's sockets are, and a line for each worker: name, process.
    """

    def __init__(self, file: IO[str]) -> None:
        self.workers: Callable[[], Mapping[str, int]] | None = None
        """Returns the processes of workers that are noted, by name, once all are ready."""
        self._file = file
        self._head = 0

    def note_sockets(self, directory: Path) -> None:
        """Let a successor find the sockets, should this process be killed."""
        self.write(f"{directory}\n")
        self._head = self._file.tell()

    def note_workers(self) -> None:
        """Let others (``agentweave doctor``) look whether each still lives.

        A disk that is full ends no worker: then it is logged, and others are told nothing.
        """
        if self.workers is None:
            return
        noted = "".join(f"{name} {pid}\n" for name, pid in self.workers().items())
        try:
            self._file.truncate(self._head)
            self.write(noted)
        except OSError as error:
            _log.warning("which workers run is not noted for `agentweave doctor`: %s", error)

    def write(self, text: str) -> None:
        """Add to the file, so that others can read it at once."""
        self._file.write(text)
        self._file.flush()


@contextmanager
def locked(state_dir: Path) -> Iterator[StateLock]:
    """Hold the state directory for this process alone; the lock ends with the process, however it ends.

    What a predecessor left that was killed (its sockets, its clients' files) is removed first.

    Raises:
        ConfigurationError: another stack holds it, it belongs to another user, or others may write it.

    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    _require_own(state_dir)
    path = state_dir / "lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.readline(64).strip() or "unknown"
            raise ConfigurationError(
                f"{state_dir} is in use by another stack (process {owner}).",
                key="state_dir",
                hint="Stop that one, or name another directory with --state-dir.",
            ) from None
        file.seek(0)
        _clear_after(file.read(8192), state_dir)
        file.truncate(0)
        lock = StateLock(file)
        lock.write(f"{os.getpid()}\n")
        try:
            yield lock
        finally:
            with suppress(OSError):
                file.truncate(0)


def _require_own(state_dir: Path) -> None:
    """Refuse a directory into which another user could put an authority, a lock or a client's file.

    Root's is for root alone: whoever may write a directory of root's is not known from here. What lies in
    the directory is looked at only where others could write it until now, see :func:`_closed`.
    """
    found = state_dir.stat()
    if found.st_uid != os.geteuid():
        raise ConfigurationError(
            f"{state_dir} belongs to user {found.st_uid}, but this process runs as user {os.geteuid()}: "
            "its owner could take every identity of the stack.",
            key="state_dir",
            hint="Run as its owner, or name a directory of your own with --state-dir.",
        )
    if found.st_mode & _OTHERS_WRITE and not _closed(state_dir):
        raise ConfigurationError(
            f"Other users may write {state_dir} (mode {stat.S_IMODE(found.st_mode):o}): "
            "they could take every identity of the stack.",
            key="state_dir",
            hint="Name a directory of your own with --state-dir, or, if only you use this one and all in it "
            f"is yours, run: chmod go-w {state_dir}",
        )


def _closed(state_dir: Path) -> bool:
    """Take from others the right to write there, if it is a state directory and nothing else.

    An agent that was served alone makes it as its umask says, to keep its audit log there, and people make an
    empty one beforehand. One with other things in it may be meant for others: that is not for a stack to end.
    """
    descriptor = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & stat.S_ISVTX or not _only_ours(descriptor):
            return False
        with suppress(OSError):
            os.fchmod(descriptor, mode & ~_OTHERS_WRITE)
        # Asked again: a file system may keep no modes, and others could still put something there until now.
        return not os.fstat(descriptor).st_mode & _OTHERS_WRITE and _only_ours(descriptor)
    finally:
        os.close(descriptor)


def _only_ours(directory: int) -> bool:
    """Return whether all there has a name that stacks and agents use, and belongs to this process's user."""
    names = os.listdir(directory)
    return _STATE | {_IGNORED} >= set(names) and all(
        os.stat(name, dir_fd=directory, follow_symlinks=False).st_uid == os.geteuid() for name in names
    )


def _clear_after(noted: str, state_dir: Path) -> None:
    """Remove what a killed predecessor left; ``noted`` is what its lock says (:class:`StateLock`)."""
    for path in (state_dir / "clients").glob("*.yaml"):
        with suppress(OSError, UnicodeDecodeError):
            if path.read_text().startswith(CLIENT_HEAD):
                path.unlink()
    _process, directory, *rest = (*noted.split("\n", 2), "")
    if rest[:-1]:  # the line is whole
        _remove_sockets(Path(directory))


def _remove_sockets(directory: Path) -> None:
    """Remove a socket directory of ours: nothing in it but sockets, and nothing that belongs to others."""
    try:
        found = directory.lstat()
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        if not (directory.is_absolute() and directory.name.startswith(_SOCKETS_PREFIX) and ours):
            return
        for path in directory.iterdir():
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()
        directory.rmdir()
    except OSError as error:
        _log.info("the sockets of the stack before this one stay in %s: %s", directory, error)


def keep_out_of_git(state_dir: Path) -> None:
    """Keep the keys there out of version control; where somebody else's files lie, nothing is done."""
    path = state_dir / _IGNORED
    if {entry.name for entry in state_dir.iterdir()} <= _STATE and not path.exists():
        path.write_text("# Keys and logs of `agentweave up`.\n*\n")
