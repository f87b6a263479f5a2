"""By how much the event loop is late, told while it is."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from agentweave_bus.runtime import loop_lag
from agentweave_bus.runtime.loop_lag import LoopLag

pytestmark = pytest.mark.anyio


async def until_below(lag: LoopLag, seconds: float) -> None:
    async with asyncio.timeout(30):
        while lag.seconds >= seconds:  # noqa: ASYNC110 - it is measured every hundredth of a second
            await asyncio.sleep(0.02)


async def test_a_stuck_loop_is_told_from_outside_while_it_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_lag, "_EVERY_S", 0.01)
    lag = LoopLag()
    assert lag.seconds == 0
    running = asyncio.ensure_future(lag.run())
    await asyncio.sleep(0.03)
    await until_below(lag, 0.15)
    told = list[float]()
    watcher = threading.Timer(0.2, lambda: told.append(lag.seconds))
    watcher.start()
    time.sleep(0.3)  # noqa: ASYNC251 - that is the point
    watcher.join()
    assert told[0] >= 0.15
    for _ in range(3):  # it measures once before it is asked
        await asyncio.sleep(0)
    assert lag.seconds >= 0.25
    await until_below(lag, 0.15)
    running.cancel()
