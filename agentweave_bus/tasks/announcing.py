"""Telling the control role which capabilities are served, so that their queues are made.

Workers make no streams and no consumers. A worker that serves durable tasks says so instead, in a signed
envelope on ``aw.control.<its own>.announce``, and the control role (:mod:`agentweave_bus.control.role`) makes
what is missing. It answers nothing: a worker sees that its queue is there when pulling from it works, and
until then it announces itself again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, Final

import anyio

from agentweave_bus.bus.connection import Session
from agentweave_bus.bus.streams import MAX_CONSUMERS
from agentweave_bus.bus.subjects import announce_subject, check_capability
from agentweave_bus.envelope import Draft, Kind, Sealer, encode_payload, new_id
from agentweave_bus.exceptions import ConfigurationError, PayloadError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = [
    "ANNOUNCE",
    "Announcer",
    "announced_capabilities",
    "announcement_payload",
]

ANNOUNCE: Final = "announce"
"""The ``cap`` of an announcement's head."""

_LIFETIME_MS: Final = 30_000
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 2.0
_FORGOTTEN_S: Final = 10.0
"""After so long without a need to announce anything, the next one begins with a short pause again."""


def announcement_payload(capabilities: Iterable[str]) -> bytes:
    """Encode what an announcement says.

    Raises:
        ConfigurationError: no capability, too many, or one whose name none can have.

    """
    names = sorted({check_capability(name) for name in capabilities})
    if not 1 <= len(names) <= MAX_CONSUMERS:
        raise ConfigurationError(
            f"an agent serves 1 to {MAX_CONSUMERS} capabilities as durable tasks, not {len(names)}"
        )
    return encode_payload({"capabilities": names})


def announced_capabilities(payload: Any) -> tuple[str, ...]:
    """Read what an announcement says, as decoded; the inverse of :func:`announcement_payload`.

    Raises:
        PayloadError: it says something else, or not in that very form.

    """
    names = payload.get("capabilities") if type(payload) is dict and len(payload) == 1 else None
    if type(names) is not list or not 1 <= len(names) <= MAX_CONSUMERS:
        raise PayloadError(f"an announcement lists 1 to {MAX_CONSUMERS} capabilities and nothing else")
    try:
        checked = tuple(check_capability(name) for name in names)
    except ConfigurationError as error:
        raise PayloadError(str(error)) from error
    if any(one >= other for one, other in pairwise(checked)):
        raise PayloadError("an announcement names each capability once, in order")
    return checked


class Announcer:
    """Announces an agent's capabilities for as long as somebody finds that their queues are not there.

    ``control`` is the control role of the broker's trust domain. One instance serves all of a worker's
    capabilities; whoever pulls any of them may use it.

    Raises:
        ConfigurationError: no capability, or too many of them.

    """

    def __init__(
        self,
        me: SpiffeID,
        control: SpiffeID,
        capabilities: Iterable[str],
        *,
        sealer: Sealer,
        clock_ms: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._control = control
        self._payload = announcement_payload(capabilities)
        self._sealer = sealer
        self._clock_ms = clock_ms
        self._monotonic = monotonic
        self._instance = ""
        self._pause = 0.0
        self._due = 0.0

    async def announce(self, session: Session) -> None:
        """Announce the capabilities if that is due, else wait until it would be; then pull again.

        It is due at once on a new session, and again 0.1 s later, 0.2 s, and so on up to every 2 s. Who calls
        it whenever pulling says that there is no queue neither floods the control role nor gives up.

        Raises:
            BusError: the connection is lost.
            SvidUnavailableError: there is no valid SVID to sign with.

        """
        now = self._monotonic()
        if session.instance != self._instance or now >= self._due + _FORGOTTEN_S:
            self._instance, self._pause, self._due = session.instance, 0.0, now
        if now < self._due:
            await anyio.sleep(self._due - now)
            return
        # Before the first wait, so that of all who ask now one sends.
        self._pause = min(max(2 * self._pause, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
        self._due = now + self._pause
        await self._send(session)

    async def _send(self, session: Session) -> None:
        now_ms, subject = self._clock_ms(), announce_subject(self._me)
        draft = Draft(
            kind=Kind.CONTROL,
            id=new_id(now_ms),
            aud=self._control,
            cap=ANNOUNCE,
            sub=subject,
            iat=now_ms,
            exp=now_ms + _LIFETIME_MS,
        )
        sealed = await self._sealer.seal(draft, self._payload)
        await session.publish(subject, sealed.frame)
