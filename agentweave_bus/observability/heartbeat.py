"""What a worker tells its supervisor, over a pipe that it inherits: that it is ready, then that it lives.

The first line is ``ready``, after a space where its metrics are, if it has a listener. Then comes a line
``beat`` with a JSON object every so often, if the supervisor asks for that, and in the end what was counted
(:mod:`.last_page`). The worker writes and never waits: a pipe that is full loses a beat, not the worker's
time.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Self

from agentweave_bus.observability.last_page import lines_of

__all__ = ["BEAT_SECONDS", "MAX_LINE_BYTES", "READY_FD", "Heartbeat", "SupervisorPipe", "resident_bytes"]

_log = logging.getLogger(__name__)

READY_FD: Final = "AGENTWEAVE_READY_FD"
"""Environment variable: the file descriptor on which a worker tells it."""

BEAT_SECONDS: Final = "AGENTWEAVE_BEAT_SECONDS"
"""Environment variable: how often to beat, in seconds; without it a worker says ``ready`` and no more."""

MAX_LINE_BYTES: Final = 4096
_SHORTEST_BEAT_S: Final = 0.05
_MOST: Final = 2**53


class Heartbeat(NamedTuple):
    """How a worker is. Times are in seconds, sizes in bytes.

    ``lag_s`` is by how much its event loop was late, ``idle_s`` for how long it has not asked for tasks
    although it had room for some (``None`` where it serves none), ``svid_s`` how long its SVID is still
    valid (``None`` without one). ``backlog`` is how many tasks wait in the queues that it shares with its
    replicas (``None`` where that is not known).
    """

    lag_s: float
    in_flight: int
    handled: int
    resident: int
    connected: bool
    idle_s: float | None = None
    svid_s: float | None = None
    backlog: int | None = None

    def line(self) -> bytes:
        """Return it as it is written to the pipe."""
        return b"beat " + json.dumps(self._asdict(), separators=(",", ":")).encode() + b"\n"

    @classmethod
    def read(cls, text: str) -> Self:
        """Read what follows ``beat``; the inverse of :meth:`line`.

        Raises:
            ValueError: it is none.

        """
        try:
            told: Any = json.loads(text)
        except RecursionError:
            raise ValueError("no heartbeat: it is nested too deep") from None
        if not isinstance(told, dict) or told.keys() != set(cls._fields):
            raise ValueError(f"no heartbeat: {text:.80}")
        counts = ("in_flight", "handled", "resident", "backlog")
        numbers = ("lag_s", "idle_s", "svid_s")
        if (
            any(type(told[name]) is not int for name in counts if name != "backlog" or told[name] is not None)
            or any(type(told[name]) not in {int, float, type(None)} for name in numbers)
            or told["lag_s"] is None
            or type(told["connected"]) is not bool
            or not all(-_MOST < told[name] < _MOST for name in (*counts, *numbers) if told[name] is not None)
        ):
            raise ValueError(f"no heartbeat: {text:.80}")
        return cls(**told)


class SupervisorPipe:
    """The worker's end of the pipe; without a supervisor what is told goes nowhere."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.every_s: float | None = None
        """How often beats are wanted, in seconds."""
        self._descriptor: int | None = None
        named = environment.get(READY_FD)
        if named is None:
            return
        try:
            self._descriptor = int(named)
            os.set_blocking(self._descriptor, False)
            os.set_inheritable(self._descriptor, False)  # it is this process that lives, not its children
            if every := environment.get(BEAT_SECONDS):
                self.every_s = max(_SHORTEST_BEAT_S, float(every))
        except (OSError, ValueError) as error:
            _log.warning("%s=%s can't be written to: %s", READY_FD, named, error)
            self._descriptor = None

    def ready(self, metrics_url: str | None) -> None:
        """Say that calls are taken from now on, and where the metrics are."""
        self._write(" ".join(filter(None, ("ready", metrics_url))).encode() + b"\n")

    def beat(self, beat: Heartbeat) -> None:
        """Say how the worker is; nobody is told where the pipe is full."""
        self._write(beat.line())

    def counted(self, page: bytes) -> None:
        """Tell what this worker has counted, as it ends, if beats are wanted: the page of its metrics."""
        if self.every_s is not None:
            for line in lines_of(page):
                self._write(line)

    def _write(self, line: bytes) -> None:
        if self._descriptor is None:
            return
        try:
            os.write(self._descriptor, line)
        except BlockingIOError:
            _log.debug("the supervisor's pipe is full")
        except OSError as error:
            _log.warning("the supervisor's pipe can't be written to: %s", error)
            self._descriptor = None


def resident_bytes() -> int:
    """Return how much of this process is in memory now, in bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - read often
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
