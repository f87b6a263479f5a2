"""The snapshot as it goes to browsers: whole at first, then the parts that have changed.

Nothing is queued for a reader: one that is slow gets the newest state when it can take it, and one that takes
nothing for half a minute is let go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import anyio
from starlette.types import Receive, Scope, Send

from agentweave_bus.console.answers import encode_json
from agentweave_bus.console.watched import Watched

__all__ = ["MOST_STREAMS", "EventStream", "LiveState"]

MOST_STREAMS: Final = 8

_INTERVAL_S: Final = 0.5
_HEARTBEAT_S: Final = 15.0
_STUCK_S: Final = 30.0


class LiveState:
    """The newest snapshot, each section as JSON, and which of them changed when.

    ``sections`` returns those that change; ``fixed`` are the others. ``clock_ms`` tells the time since the
    epoch, which stands in all that is sent.
    """

    def __init__(
        self,
        sections: Callable[[], Mapping[str, Any]],
        fixed: Mapping[str, Any],
        watched: Watched,
        clock_ms: Callable[[], int],
    ) -> None:
        self._sections = sections
        self._watched = watched
        self._clock_ms = clock_ms
        self._fixed = {name: encode_json(value) for name, value in fixed.items()}
        self._newest: dict[str, bytes] = {}
        self._changed_in: dict[str, int] = {}
        self._version = 0
        self._news = asyncio.Event()
        self._closed = False

    async def run(self) -> None:
        """Look for changes while somebody reads, until cancelled."""
        while True:
            await self._watched.somebody()
            self._refresh()
            await asyncio.sleep(_INTERVAL_S)

    def close(self) -> None:
        """Have every stream end."""
        self._closed = True
        self._wake()

    @property
    def closed(self) -> bool:
        """Whether streams are to end."""
        return self._closed

    def whole(self) -> tuple[bytes, int]:
        """Return the whole snapshot, a JSON object, and its version."""
        self._refresh()
        return self._object({**self._fixed, **self._newest}), self._version

    async def changes(self, since: int) -> tuple[bytes, int]:
        """Wait for something newer than version ``since``; return what changed, and its version.

        What changed is a JSON object. It is empty when streams are to end.
        """
        while self._version <= since and not self._closed:
            await self._news.wait()
        changed = {name: data for name, data in self._newest.items() if self._changed_in[name] > since}
        return (b"" if self._closed else self._object(changed)), self._version

    def _refresh(self) -> None:
        version = self._version + 1
        for name, value in self._sections().items():
            data = encode_json(value)
            if self._newest.get(name) != data:
                self._newest[name] = data
                self._changed_in[name] = self._version = version
        if self._version == version:
            self._wake()

    def _object(self, parts: Mapping[str, bytes]) -> bytes:
        members = [b'"%b":%b' % (name.encode(), data) for name, data in parts.items()]
        return b'{"now":%d,%b}' % (self._clock_ms(), b",".join(members))

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class EventStream:
    """An answer of server-sent events: ``state``, then ``change`` whenever there is one."""

    def __init__(self, state: LiveState, watched: Watched) -> None:
        self._state = state
        self._watched = watched

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the reader goes, or the console ends."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        with self._watched.look():
            async with anyio.create_task_group() as group:
                group.start_soon(_until_gone, receive, group.cancel_scope)
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await self._events(send)
                group.cancel_scope.cancel()

    async def _events(self, send: Send) -> None:
        data, version = self._state.whole()
        taken = await _taken(send, b"event: state\ndata: " + data + b"\n\n")
        while taken:
            try:
                async with asyncio.timeout(_HEARTBEAT_S):
                    data, version = await self._state.changes(version)
            except TimeoutError:
                taken = await _taken(send, b": here\n\n")
                continue
            if self._state.closed:
                break
            taken = await _taken(send, b"event: change\ndata: " + data + b"\n\n")
        if taken:
            await send({"type": "http.response.body", "body": b""})


async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _taken(send: Send, data: bytes) -> bool:
    """Send something; False if the reader did not take it in time, or is gone."""
    try:
        async with asyncio.timeout(_STUCK_S):
            await send({"type": "http.response.body", "body": data, "more_body": True})
    except (TimeoutError, OSError):
        return False
    return True
