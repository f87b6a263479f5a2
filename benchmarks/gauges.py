"""What a process has used, as the kernel counts it. Linux only."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["cpu_seconds", "processors", "resident_bytes"]


def cpu_seconds(pid: int) -> float:
    """Return the processor time of process ``pid``, all of its threads, in seconds.

    It is read from the process's own clock (``clock_getcpuclockid(3)`` makes its number so), because
    ``/proc/PID/stat`` counts in hundredths of a second.
    """
    return time.clock_gettime(((~pid) << 3) | 2)


def resident_bytes(pid: int) -> int:
    """Return the resident memory of process ``pid`` in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ProcessLookupError(pid)


def processors() -> int:
    """Return how many processors this process, and what it starts, may run on."""
    return len(os.sched_getaffinity(0))
