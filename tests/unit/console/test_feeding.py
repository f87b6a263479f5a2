"""A feed that fails in a way nobody foresaw."""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.console import feeding as module
from agentweave_bus.console.feeding import feeding
from agentweave_bus.console.model import ConsoleModel


@pytest.mark.anyio
async def test_it_is_told_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AGAIN_S", 0.0)
    model = ConsoleModel(trust_domain="demo.test", clock_ms=lambda: 1)
    whys: list[str] = []

    async def run() -> None:
        whys.append(model.health("workers").why)
        if len(whys) == 1:
            raise KeyError("secret")

    await asyncio.wait_for(feeding(model, "workers", run), 30)
    assert whys == ["not asked yet", "the console itself failed here; its log says how"]
