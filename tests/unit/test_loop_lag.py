"""By how much the event loop is late, told while it is."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from agentweave_bus.runtime import loop_lag
from agentweave_bus.runtime.loop_lag import LoopLag

pytestmark = pytest.mark.anyio


async def test_a_stuck_loop_is_told_from_outside_while_it_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_lag, "_EVERY_S", 0.01)
    lag = LoopLag()
    assert lag.seconds == 0
    running = asyncio.ensure_future(lag.run())
    await asyncio.sleep(0.03)
    before, told = lag.seconds, list[float]()
    watcher = threading.Timer(0.2, lambda: told.append(lag.seconds))
    watcher.start()
    time.sleep(0.3)  # noqa: ASYNC251 - that is the point
    watcher.join()
    assert told[0] >= 0.15 > before
    await asyncio.sleep(0.005)  # it measures once before it is asked
    assert lag.seconds >= 0.25
    await asyncio.sleep(0.1)
    assert lag.seconds < 0.15
    running.cancel()
