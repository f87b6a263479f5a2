"""Secrets under a path, without a file on disk.

OpenSSL and some libraries take keys by path only. A :class:`MemoryFile` gives them one: an anonymous,
sealed memory file (``memfd``), readable through ``/proc/self/fd`` by this process alone and gone with
it. Where the platform has no memory files, it is a 0600 file in a 0700 folder, removed on close.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MemoryFile"]

_SEALS: Final = ("F_SEAL_WRITE", "F_SEAL_GROW", "F_SEAL_SHRINK", "F_SEAL_SEAL")


class MemoryFile:
    """``content`` under :attr:`path` until :meth:`close`, or until nothing refers to the object.

    A context manager. The path is for this process only; another process can't open it.
    """

    __slots__ = ("__weakref__", "_release", "path")

    path: str

    def __init__(self, content: bytes, *, name: str = "svid") -> None:
        make = _in_memory if Path("/proc/self/fd").is_dir() and hasattr(os, "memfd_create") else _on_disk
        self.path, release = make(content, name)
        self._release = weakref.finalize(self, release)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the content. Closing twice does no harm."""
        self._release()


def _in_memory(content: bytes, name: str) -> tuple[str, Callable[[], None]]:
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(descriptor, 0o600)
        _write_all(descriptor, content)
        seals = sum(int(getattr(fcntl, seal)) for seal in _SEALS)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return f"/proc/self/fd/{descriptor}", lambda: os.close(descriptor)


def _on_disk(content: bytes, name: str) -> tuple[str, Callable[[], None]]:
    folder = Path(tempfile.mkdtemp(prefix="agentweave-"))
    path = folder / name
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _write_all(descriptor, content)
        finally:
            os.close(descriptor)
    except BaseException:
        shutil.rmtree(folder)
        raise
    return str(path), lambda: shutil.rmtree(folder)


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
