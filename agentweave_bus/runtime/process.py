"""What a process that is one agent does about its own memory, once that agent has started.

For processes that this project starts. An agent inside somebody's own program leaves these to the program.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import re
from pathlib import Path
from typing import Final

__all__ = ["settle"]

_YOUNG_OBJECTS: Final = 10_000
"""Allocations between two looks for cycles; calls make thousands of objects and hardly any cycle."""

_MAPPINGS: Final = Path("/proc/self/smaps")
_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+ *(.*)")


def settle() -> None:
    """Take what starting has left out of the collector's sight, and give its waste back to the system."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
    libc = ctypes.CDLL(None)
    trim = getattr(libc, "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    _let_go_of_code(libc)


def _let_go_of_code(libc: ctypes.CDLL) -> None:
    """Let go of the pages of libraries' code, of which serving runs a part: the policy's compiler is done.

    What is run again comes back from the page cache. The kernel takes such pages away by itself where memory
    is short; here it is told which.
    """
    try:
        smaps = _MAPPINGS.read_text()
    except OSError:
        return  # not Linux, or it does not tell
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in _unwritten_code(smaps):
        libc.madvise(start, end - start, mmap.MADV_DONTNEED)


def _unwritten_code(smaps: str) -> list[tuple[int, int]]:
    """Return from where to where code lies that is as it is in its file.

    Where something was written into it (a debugger's breakpoint), that would be lost.
    """
    found: list[tuple[int, int]] = []
    here: tuple[int, int] | None = None
    for line in smaps.splitlines():
        if mapping := _MAPPING.fullmatch(line):
            start, end, rights, file = mapping.groups()
            is_code = rights == "r-xp" and file.startswith("/")
            here = (int(start, 16), int(end, 16)) if is_code else None
        elif here is not None and line.startswith("Anonymous:") and line.split()[1] == "0":
            found.append(here)
    return found
