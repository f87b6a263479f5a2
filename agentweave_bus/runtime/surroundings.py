"""What a participant stands on that is no part of it: time, the way to a broker, the engine, signals.

In service it is always :data:`REAL`. The testing tools put others in, so that everything between them is the
very code that runs in service.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from nats.aio.client import Client

from agentweave_bus.authz import PolicyEngine
from agentweave_bus.bus.connection import BrokerClient

__all__ = ["REAL", "Surroundings"]


def _as_it_is(engine: PolicyEngine) -> PolicyEngine:
    return engine


def _nothing(_parts: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where time, connections and orders to stop come from.

    ``time_ns`` is the time since the epoch and ``monotonic_ns`` that of a clock which is never set, both in
    nanoseconds; what sleeps or waits uses the event loop's own. ``new_client`` makes the client library's
    connection. ``around_engine`` may put something in front of the policy engine. ``stop_signals`` replaces
    SIGINT and SIGTERM. ``on_wired`` is shown the ``Connected`` that was put together, before it connects.
    """

    time_ns: Callable[[], int] = time.time_ns
    monotonic_ns: Callable[[], int] = time.monotonic_ns
    new_client: Callable[[], Client] = BrokerClient
    around_engine: Callable[[PolicyEngine], PolicyEngine] = _as_it_is
    stop_signals: Callable[[], AbstractContextManager[Callable[[], Awaitable[None]]]] | None = None
    on_wired: Callable[[object], None] = _nothing

    def clock_ms(self) -> int:
        """Return the time, in milliseconds since the epoch."""
        return self.time_ns() // 1_000_000

    def wall_s(self) -> float:
        """Return the time, in seconds since the epoch."""
        return self.time_ns() / 1e9

    def monotonic_s(self) -> float:
        """Return the clock that is never set, in seconds."""
        return self.monotonic_ns() / 1e9

    def monotonic_ms(self) -> int:
        """Return the clock that is never set, in milliseconds."""
        return self.monotonic_ns() // 1_000_000


REAL: Final = Surroundings()
