"""Children that do not outlive this process, however it ends.

A parent that is killed outright can stop nobody. On Linux the kernel does it: a child may ask for a signal
at its parent's death (``prctl(2)``, ``PR_SET_PDEATHSIG``), and keeps that over ``execve``. A child of ours
is therefore started as a tiny Python program that asks for the signal and then becomes the real one, with
the same process id. (Asking between fork and exec would run Python in a forked process with threads.)

The kernel means the *thread* that started the child: start children from one that lives as long as they do.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final

import anyio

__all__ = ["dies_with_this_process", "start_child"]

_LAUNCHER: Final = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[1]), 0, 0, 0)
if os.getppid() != int(sys.argv[2]):
    os._exit(1)  # the parent has died in between
os.execv(sys.argv[3], sys.argv[3:])
"""


def dies_with_this_process(command: Sequence[str], *, by: signal.Signals = signal.SIGKILL) -> tuple[str, ...]:
    """Return the command line that starts ``command`` so that it gets signal ``by`` when this process dies.

    ``command[0]`` is a path. Elsewhere than on Linux ``command`` is returned as it is.
    """
    if not sys.platform.startswith("linux"):
        return tuple(command)
    return (sys.executable, "-I", "-S", "-c", _LAUNCHER, str(int(by)), str(os.getpid()), *command)


async def start_child(
    command: Sequence[str], *, by: signal.Signals = signal.SIGKILL, **options: Any
) -> asyncio.subprocess.Process:
    """Start ``command`` so that it gets signal ``by`` when this process dies.

    ``options`` are those of :func:`asyncio.create_subprocess_exec`, which says what is raised. Starting takes
    a moment, and no cancelled scope gives it up half-way: nobody would reap what there is of a child then.
    """
    with anyio.CancelScope(shield=True):
        process = await asyncio.create_subprocess_exec(*dies_with_this_process(command, by=by), **options)
    return process  # noqa: RET504 - to mypy a scope may be left without returning
