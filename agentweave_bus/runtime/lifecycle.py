"""What is outside of a process that serves: its log, its health, the word that it's ready, orders to stop."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anyio

from agentweave_bus.config import LoggingConfig, MetricsConfig
from agentweave_bus.observability.exposition import Exposition
from agentweave_bus.observability.heartbeat import BEAT_SECONDS, READY_FD, SupervisorPipe
from agentweave_bus.observability.logs import configure_logging
from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.runtime.readiness import Readiness
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["health_listener", "logging_of", "say_ready", "stop_signals"]

_log = logging.getLogger(__name__)


@contextmanager
def logging_of(settings: LoggingConfig) -> Iterator[None]:
    """Log as configured for the block, unless the program has configured logging itself."""
    if logging.getLogger().handlers:
        yield
        return
    restore = configure_logging(settings)
    try:
        yield
    finally:
        restore()


@contextmanager
def health_listener(
    settings: MetricsConfig,
    metrics: Metrics,
    me: SpiffeID,
    readiness: Readiness,
) -> Iterator[str | None]:
    """Serve ``/metrics``, ``/healthz`` and ``/readyz`` where the configuration wants them; yield the URL."""
    if not settings.enabled:
        yield None
        return

    def health() -> tuple[bool, Mapping[str, Any]]:
        return True, {"agent": str(me)}

    readiness.shown_in(metrics)
    with Exposition(settings, metrics, health=health, ready=readiness.told) as listener:
        _log.info("metrics and health on %s", listener.url)
        yield listener.url


def say_ready(me: SpiffeID, metrics_url: str | None) -> SupervisorPipe:
    """Tell whoever started this process that it does its work from now on; return how to tell it more."""
    _log.info("%s is ready", me)
    pipe = SupervisorPipe(os.environ)
    for name in (READY_FD, BEAT_SECONDS):
        os.environ.pop(name, None)  # it is this process that is ready, none that it starts
    pipe.ready(metrics_url)
    return pipe


@contextmanager
def stop_signals() -> Iterator[Callable[[], Awaitable[None]]]:
    """Take SIGINT and SIGTERM over for the block; yield what waits for one.

    Outside the main thread, where there are no signals, that waits for cancellation.
    """
    if threading.current_thread() is not threading.main_thread():
        yield anyio.sleep_forever
        return
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:

        async def received() -> None:
            async for number in signals:
                _log.info("stopping on %s", signal.Signals(number).name)
                return

        yield received
