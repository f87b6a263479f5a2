"""Debian's Chromium, driven over its DevTools protocol, and a tab that notes whatever it complains about."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from playwright.async_api import Browser, Page, async_playwright

__all__ = ["WHY_NOT", "Tab", "chromium", "found_chromium"]

WHY_NOT = "there is no chromium here: apt-get install chromium"
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_PATIENCE_MS = 30_000
# What a console that is away for a while makes a browser say.
_ABSENCE = (
    "net::ERR_CONNECTION_REFUSED",
    "net::ERR_INCOMPLETE_CHUNKED_ENCODING",
    "net::ERR_CONNECTION_RESET",
    "status of 403",
)


def found_chromium() -> str | None:
    """Where the browser is."""
    return next((path for path in map(shutil.which, _NAMES) if path), None)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=found_chromium())
        try:
            yield browser
        finally:
            await browser.close()


class Tab:
    """A page in a profile of its own."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.may_be_away = False
        """Whether requests may fail because nobody answers."""
        page.on("console", lambda said: self._heard(said.type, said.text))
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))

    @classmethod
    @asynccontextmanager
    async def of(cls, browser: Browser, **options: Any) -> AsyncIterator[Tab]:
        """Nothing may be complained of until it is closed: no error, and nothing that the page's own policy forbids."""
        profile = await browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        try:
            profile.set_default_timeout(_PATIENCE_MS)
            tab = cls(await profile.new_page())
            yield tab
            assert tab.complaints == []
        finally:
            await profile.close()

    async def open(self, url: str) -> None:
        """Open a console and wait until it shows what it knows."""
        await self.page.goto(url)
        await self.page.wait_for_selector("main[aria-busy=false]")

    async def text(self, selector: str) -> str:
        return " ".join((await self.page.inner_text(selector)).split())

    async def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true. (The driver's own way evaluates text in the page: forbidden.)"""
        with anyio.fail_after(_PATIENCE_MS / 1000):
            while not await self.page.evaluate(expression):  # noqa: ASYNC110 - only asking tells
                await anyio.sleep(0.03)

    def _heard(self, kind: str, text: str) -> None:
        if kind not in {"error", "warning"}:
            return
        if not (self.may_be_away and any(one in text for one in _ABSENCE)):
            self.complaints.append(f"{kind}: {text}")
