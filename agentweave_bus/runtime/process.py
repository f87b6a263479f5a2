"""What a process that is one agent does about its own memory, once that agent has started.

For processes that this project starts. An agent inside somebody's own program leaves these to the program.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Final

__all__ = ["settle"]

_YOUNG_OBJECTS: Final = 10_000
"""Allocations between two looks for cycles; calls make thousands of objects and hardly any cycle."""


def settle() -> None:
    """Take what starting has left out of the collector's sight, and give its waste back to the system."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, *gc.get_threshold()[1:])
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
