"""Telling the control role that this identity stores large payloads, so that a stream for them is made.

It is an announcement like that of capabilities (:mod:`.announcing`): signed, on the same subject, answered by
nobody. Whoever stores sees that its stream is there when something is stored in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from agentweave_bus.bus.connection import Session
from agentweave_bus.envelope import Sealer, encode_payload
from agentweave_bus.exceptions import PayloadError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.announcing import send_announcement

__all__ = ["ANNOUNCE_BLOBS", "BlobAnnouncement", "BlobAnnouncer"]

ANNOUNCE_BLOBS: Final = "announce_blobs"
"""The ``cap`` of such an announcement's head."""

_SHORTEST_PAUSE_S: Final = 0.05


class BlobAnnouncement:
    """What is announced: nothing but that."""

    def encoded(self) -> bytes:
        """Return it as a payload."""
        return encode_payload({})

    @classmethod
    def read(cls, payload: Any) -> BlobAnnouncement:
        """Read it as decoded. Raises PayloadError if it says something else."""
        if payload != {} or type(payload) is not dict:
            raise PayloadError("an announcement of large payloads says nothing more")
        return cls()


class BlobAnnouncer:
    """Announces for one identity; of those who want it at the same time, once."""

    def __init__(
        self,
        me: SpiffeID,
        control: SpiffeID,
        *,
        sealer: Sealer,
        clock_ms: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._control = control
        self._sealer = sealer
        self._clock_ms = clock_ms
        self._monotonic = monotonic
        self._said = float("-inf")

    async def announce(self, session: Session) -> None:
        """Tell the control role.

        Raises:
            BusError: the connection is lost.
            SvidUnavailableError: there is no valid SVID to sign with.

        """
        now = self._monotonic()
        if now < self._said + _SHORTEST_PAUSE_S:
            return
        self._said = now
        await send_announcement(
            session,
            self._me,
            self._control,
            ANNOUNCE_BLOBS,
            BlobAnnouncement().encoded(),
            sealer=self._sealer,
            now_ms=self._clock_ms(),
        )
