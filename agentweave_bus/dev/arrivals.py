"""What other processes ask while this one's time of day is behind: it waits until that is right again.

To a clock that is behind it would be issued in the future, and be refused for that, a stored task for good.
Nothing is believed of a message to find that out, and nothing is left out of what is checked afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from anyio.abc import TaskGroup
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from agentweave_bus.bus.connection import BrokerClient
from agentweave_bus.dev.rest import RestingClock
from agentweave_bus.envelope import Kind, decode_frame, parse_head
from agentweave_bus.exceptions import AgentWeaveError

__all__ = ["PatientClient"]

_log = logging.getLogger(__name__)

_ASKING: Final = frozenset({Kind.CALL, Kind.TASK, Kind.EVENT, Kind.REISSUE, Kind.CONTROL})
"""Answers don't wait: somebody here waits for them, and so long the clock is behind."""

_AS_GOOD_AS_NOW_S: Final = 1.0
_MOST_KEPT: Final = 1024
"""For each connection; what comes on top is handed on at once."""


class PatientClient(BrokerClient):
    """The client library's connection; what comes too early for ``clock`` is handed on in ``late``."""

    def __init__(self, clock: RestingClock, late: TaskGroup) -> None:
        super().__init__()
        self._clock = clock
        self._late = late
        self._kept = 0

    async def subscribe(  # type: ignore[override]  # as it is called here
        self, subject: str, queue: str = "", cb: Callable[[Msg], Awaitable[None]] | None = None, **more: Any
    ) -> Subscription:
        """Subscribe; ``cb`` gets each message when the time of day is right for it."""
        assert cb is not None  # nothing here subscribes without
        return await super().subscribe(subject, queue, partial(self._received, cb), **more)

    async def _received(self, cb: Callable[[Msg], Awaitable[None]], message: Msg) -> None:
        is_behind = self._clock.behind_s() > _AS_GOOD_AS_NOW_S
        if is_behind and self._kept < _MOST_KEPT and self._is_early(message.data):
            self._kept += 1
            self._late.start_soon(self._hand_on, cb, message)
        else:
            await cb(message)

    async def _hand_on(self, cb: Callable[[Msg], Awaitable[None]], message: Msg) -> None:
        try:
            await self._clock.until_right()
            await cb(message)
        except Exception:  # noqa: BLE001 - the last boundary: one message must not stop the others
            _log.exception("what came while the loop was held could not be handed on")
        finally:
            self._kept -= 1

    def _is_early(self, data: bytes) -> bool:
        try:
            head = parse_head(decode_frame(data).head)
        except AgentWeaveError:
            return False  # whoever gets it says what is wrong with it
        ahead_s = head.iat / 1000 - self._clock.time_ns() / 1e9
        return head.kind in _ASKING and ahead_s > _AS_GOOD_AS_NOW_S
