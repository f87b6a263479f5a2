"""Keeping a feed alive, and the console and whoever runs it unharmed by one that fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from agentweave_bus.console.model import ConsoleModel

__all__ = ["feeding"]

_log = logging.getLogger(__name__)

_AGAIN_S: Final = 5.0
_UNFORESEEN: Final = "the console itself failed here; its log says how"


async def feeding(model: ConsoleModel, source: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run a feed until it returns. After what nobody foresaw the page says so, and it begins anew."""
    while True:
        try:
            await run()
        except Exception:  # noqa: BLE001 - the last boundary: a console is a guest where it is opened
            _log.exception("what the console hears from its source %r could not be used", source)
            model.source_failed(source, _UNFORESEEN)
        else:
            return
        await asyncio.sleep(_AGAIN_S)
