"""The console, opened as a browser opens it: what people would see of all that happened."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from typing import Any, Final
from urllib.parse import urlsplit

import anyio.to_thread

from agentweave_bus.console import Console
from workers.ecommerce.demo.screen import Check

__all__ = ["ConsolePage"]

must = Check.must

_SECONDS: Final = 30.0
_FORBIDDEN: Final = 403


class ConsolePage:
    """What a person does with the console's page."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._cookie = ""

    async def opened_once(self, check: Check) -> None:
        """Open it by its address, and try the same address again."""
        address = self._console.url
        self._cookie = (await self._get(address)).headers["set-cookie"].partition(";")[0]
        stranger = ConsolePage(self._console)
        again = (await stranger._get(address)).status
        bare = (await stranger._get(self._console.address)).status
        must((again, bare) == (_FORBIDDEN, _FORBIDDEN), f"a stranger was answered {again} and {bare}")
        check.came_out(
            "once; the second time, and without a token: refused", f"at {self._console.address}, on loopback"
        )

    async def shows(self, check: Check, *, tasks: dict[str, int], agents: int) -> None:
        """Follow it until it shows so many tasks of each state, and all agents at work."""
        url = f"{self._console.address}api/events"
        with anyio.fail_after(_SECONDS):
            state = await anyio.to_thread.run_sync(
                _followed, url, self._cookie, lambda shown: _shown(shown, tasks, agents)
            )
        denied = state["decision_counts"]["denied"]
        told = ", ".join(f"{count} {name}" for name, count in tasks.items())
        check.came_out(
            f"{agents} agents at work; tasks: {told}",
            f"by records that it had verified, and {denied} denials by the audit logs",
        )

    async def _get(self, url: str) -> _Answer:
        with anyio.fail_after(_SECONDS):
            return await anyio.to_thread.run_sync(_answer, url, self._cookie)


class _Answer:
    def __init__(self, response: HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.text = response.read().decode()


def _answer(url: str, cookie: str) -> _Answer:
    with _asked(url, cookie) as response:
        return _Answer(response)


def _followed(url: str, cookie: str, enough: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Put together what the server tells as events, until it is enough."""
    state: dict[str, Any] = {}
    give_up = time.monotonic() + _SECONDS
    with _asked(url, cookie) as response:
        for line in response:
            if line.startswith(b"data:"):
                state |= json.loads(line.removeprefix(b"data:"))
                if enough(state):
                    break
            must(time.monotonic() < give_up, f"it shows {state.get('counts')}, {state.get('sources')}")
    return state


@contextmanager
def _asked(url: str, cookie: str) -> Iterator[HTTPResponse]:
    parts = urlsplit(url)
    connection = HTTPConnection(parts.netloc, timeout=_SECONDS)
    try:
        path = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request("GET", path, headers={"Cookie": cookie} if cookie else {})
        yield connection.getresponse()
    finally:
        connection.close()


def _shown(state: dict[str, Any], tasks: dict[str, int], agents: int) -> bool:
    ready = [
        agent
        for agent in state["agents"]
        if agent["replicas"] and all(one["state"] == "ready" for one in agent["replicas"])
    ]
    counts = state["counts"]
    return len(ready) == agents and all(counts[name] == count for name, count in tasks.items())
