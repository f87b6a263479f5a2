"""Requests for messages that wait at a pull consumer: whose turn it is, and what they are told meanwhile.

They take turns, one message each. One is told that its time is up (408), that there is nothing for who does
not want to wait (404), that too many wait already (409), and that the consumer is still there (100). One that
nobody listens to any more is forgotten. Times run by the event loop's clock, so that a virtual one drives
them.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from agentweave_bus.testing.memory_messages import Router

__all__ = ["Requests"]

_NANOSECONDS: Final = 1_000_000_000
_KNOWN: Final = frozenset({"batch", "expires", "no_wait", "idle_heartbeat"})


@dataclass(slots=True, eq=False)
class _Request:
    """Somebody who waits: how many more, where to, until when, and when to be told that all is well."""

    reply: str
    left: int
    no_wait: bool = False
    expires: float | None = None
    heartbeat: float = 0.0
    next_beat: float | None = None
    served: bool = False

    def next_due(self) -> float | None:
        return min((one for one in (self.expires, self.next_beat) if one is not None), default=None)


class Requests:
    """Those who wait at one consumer, at most ``most``; ``place`` tells the headers of a heartbeat."""

    def __init__(self, router: Router, most: int, place: Callable[[], dict[str, str]]) -> None:
        self._router = router
        self._most = most
        self._place = place
        self._waiting: deque[_Request] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, data: bytes, reply: str, available: int) -> None:
        """Take a request, or answer why not; ``available`` is how many messages could be given out."""
        try:
            request = _read(data, reply)
        except ValueError as error:
            self._tell(reply, "400", f"Bad Request - {error}")
            return
        if len(self) >= self._most:
            self.look()
        if request.no_wait and not self._may_try(request, available):
            return
        if len(self) >= self._most:
            if not request.heartbeat:  # who has one waits for that instead of asking at once again
                self._tell(reply, "409", "Exceeded MaxWaiting")
            return
        self._waiting.append(request)

    def next(self) -> str | None:
        """Say where the next message goes to; that takes a turn."""
        while self._waiting:
            request = self._waiting.popleft()
            if not self._router.is_heard(request.reply):
                continue
            request.left -= 1
            request.served = True
            if request.left > 0:
                self._waiting.append(request)
                if request.heartbeat:
                    request.next_beat = asyncio.get_running_loop().time() + request.heartbeat
            return request.reply
        return None

    def look(self, *, at_end: bool = False) -> None:
        """Tell those who wait what is due, and let go of some; ``at_end``: there are no more messages now."""
        now = asyncio.get_running_loop().time()
        self._waiting = deque(one for one in self._waiting if self._goes_on(one, now, at_end))
        dues = [due for due in (one.next_due() for one in self._waiting) if due is not None]
        self._arm(min(dues, default=None))

    def close(self) -> None:
        """Tell everyone that the consumer is no more."""
        for request in self._waiting:
            self._tell(request.reply, "409", "Consumer Deleted")
        self._waiting.clear()
        self._arm(None)

    def _may_try(self, request: _Request, available: int) -> bool:
        if available:
            self.look()
            enough = available >= sum(one.left for one in self._waiting)
            if not enough:
                self._tell(request.reply, "408", "Requests Pending")
            return enough
        if request.expires is None:
            self._tell(request.reply, "404", "No Messages")
            return False
        return True

    def _goes_on(self, request: _Request, now: float, at_end: bool) -> bool:
        if request.expires is not None and request.expires <= now:
            left = {"Nats-Pending-Messages": str(request.left), "Nats-Pending-Bytes": "0"}
            self._tell(request.reply, "408", "Request Timeout", left)
            return False
        if at_end and request.no_wait and (request.expires is None or request.served):
            self._tell(request.reply, "404", "No Messages")
            return False
        if not self._router.is_heard(request.reply):
            return False
        if request.next_beat is not None and request.next_beat <= now:
            self._tell(request.reply, "100", "Idle Heartbeat", self._place())
            request.next_beat = now + request.heartbeat
        return True

    def _arm(self, due: float | None) -> None:
        if self._timer is not None:
            if self._timer.when() == due and not self._timer.cancelled():
                return
            self._timer.cancel()
        self._timer = None if due is None else asyncio.get_running_loop().call_at(due, self._due)

    def _due(self) -> None:
        self._timer = None
        self.look(at_end=True)

    def _tell(self, reply: str, status: str, description: str, more: dict[str, str] | None = None) -> None:
        headers = {"Status": status, "Description": description, **(more or {})}
        self._router.route(reply, b"", headers=headers)


def _read(data: bytes, reply: str) -> _Request:
    """Read what is asked for: nothing is one message, and a bare number a batch. Raises ValueError."""
    body: Any = json.loads(data) if data else 1
    if not isinstance(body, dict):
        body = {"batch": int(body)}
    if unknown := sorted(body.keys() - _KNOWN):
        raise ValueError(f"the in-memory broker does not know {', '.join(unknown)}")
    expires, heartbeat = body.get("expires", 0), body.get("idle_heartbeat", 0)
    if heartbeat and 2 * heartbeat > expires:
        raise ValueError("heartbeat value too large")
    request = _Request(reply, max(1, int(body.get("batch", 1))), bool(body.get("no_wait")))
    now = asyncio.get_running_loop().time()
    if expires:
        request.expires = now + expires / _NANOSECONDS
    if heartbeat:
        request.heartbeat = heartbeat / _NANOSECONDS
        request.next_beat = now + request.heartbeat
    return request
