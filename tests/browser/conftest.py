"""A browser for every test here; where there is none they are skipped, and say so."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.browser.chromium import WHY_NOT, Tab, chromium, found_chromium
from tests.browser.stage import Stage
from tests.integration.fixtures import *  # noqa: F403
from tests.integration.fixtures import _tests_own_logging_and_signals  # noqa: F401


@pytest.fixture(scope="session")
async def browser(anyio_backend: str) -> AsyncIterator[Any]:
    if found_chromium() is None:
        pytest.skip(WHY_NOT)
    async with chromium() as started:
        yield started


@pytest.fixture
async def new_tab(browser: Any) -> AsyncIterator[Callable[..., Any]]:
    """Open tabs, of which none may have complained of anything when the test ends."""
    async with AsyncExitStack() as tabs:

        async def open_one(url: str, **options: Any) -> Tab:
            tab = await tabs.enter_async_context(Tab.of(browser, **options))
            await tab.open(url)
            return tab

        yield open_one


@pytest.fixture
async def stage(request: Any) -> AsyncIterator[Stage]:
    async with Stage(**getattr(request, "param", {})).open() as opened:
        yield opened
