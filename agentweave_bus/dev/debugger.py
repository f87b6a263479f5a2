"""Breakpoints in a process of several agents: whatever thread stands at one, all stand.

A breakpoint on the event loop holds it by itself. A plain ``def`` handler runs in a thread; while that stands
at a breakpoint the loop is made to stand, too, so that time rests for it likewise.
"""

from __future__ import annotations

import asyncio
import os
import pdb  # noqa: T100 - this is what it is for
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["breakpoints_hold"]


@contextmanager
def breakpoints_hold(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Have ``breakpoint()`` hold ``loop`` for the block, unless another debugger has been chosen.

    Ctrl-C at such a breakpoint stops the program, once it is let go on, and not the debugger.
    """
    if sys.breakpointhook is not sys.__breakpointhook__ or "PYTHONBREAKPOINT" in os.environ:
        yield
        return
    loop_thread, one_at_a_time = threading.get_ident(), threading.RLock()

    class Debugger(pdb.Pdb):
        """pdb, which lets nobody go on while it asks its user."""

        def interaction(self, *args: Any, **kwargs: Any) -> None:
            if threading.get_ident() == loop_thread:
                super().interaction(*args, **kwargs)
                return
            with one_at_a_time, _standing(loop):
                super().interaction(*args, **kwargs)

    def begin(*_args: Any, **_kwargs: Any) -> None:
        Debugger(nosigint=True).set_trace(sys._getframe(1))  # noqa: SLF001 - the documented way to name a frame

    sys.breakpointhook = begin
    try:
        yield
    finally:
        sys.breakpointhook = sys.__breakpointhook__


@contextmanager
def _standing(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Make the event loop's thread stand still for the block."""
    go_on = threading.Event()
    try:
        loop.call_soon_threadsafe(go_on.wait)
    except RuntimeError:  # it is closed
        yield
        return
    try:
        yield
    finally:
        go_on.set()
