"""Telling the control role which capabilities are served, so that their queues are made.

Workers make no streams and no consumers. A worker that serves durable tasks says so instead, in a signed
envelope on ``aw.control.<its own>.announce``, and the control role (:mod:`agentweave_bus.control.role`) makes
what is missing, and changes what was made for an announcement that said otherwise. It answers nothing: a
worker sees that its queue is there when pulling from it works, and until then it announces itself again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, Final, NamedTuple

import anyio

from agentweave_bus.bus.connection import Session
from agentweave_bus.bus.streams import MAX_CONSUMERS
from agentweave_bus.bus.subjects import announce_subject, check_capability
from agentweave_bus.envelope import Draft, Kind, Sealer, encode_payload, new_id
from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError, PayloadError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = [
    "ANNOUNCE",
    "LONGEST_ACK_WAIT_S",
    "SHORTEST_ACK_WAIT_S",
    "Announcer",
    "TaskAnnouncement",
    "send_announcement",
]

_log = logging.getLogger(__name__)

ANNOUNCE: Final = "announce"
"""The ``cap`` of an announcement's head."""

SHORTEST_ACK_WAIT_S: Final = 1
LONGEST_ACK_WAIT_S: Final = 3_600

_ACK_WAIT: Final = (
    f"the broker waits {SHORTEST_ACK_WAIT_S} to {LONGEST_ACK_WAIT_S} seconds for a worker's word"
)

_LIFETIME_MS: Final = 30_000
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 2.0
_FORGOTTEN_S: Final = 10.0
"""After so long without a need to announce anything, the next one begins with a short pause again."""


class TaskAnnouncement(NamedTuple):
    """What is announced: which capabilities are served as durable tasks.

    ``ack_wait_s`` is after how many seconds without a word from a worker the broker is to give its task to
    another one; ``None`` leaves that to the control role.
    """

    capabilities: tuple[str, ...]
    ack_wait_s: float | None = None

    def encoded(self) -> bytes:
        """Return it as a payload.

        Raises:
            ConfigurationError: no capability, too many, a name that none can have, or a time out of bounds.

        """
        names = sorted({check_capability(name) for name in self.capabilities})
        if not 1 <= len(names) <= MAX_CONSUMERS:
            raise ConfigurationError(
                f"an agent serves 1 to {MAX_CONSUMERS} capabilities as durable tasks, not {len(names)}"
            )
        payload: dict[str, Any] = {"capabilities": names}
        if (seconds := self.ack_wait_s) is not None:
            if not SHORTEST_ACK_WAIT_S <= seconds <= LONGEST_ACK_WAIT_S:
                raise ConfigurationError(f"{_ACK_WAIT}, not {seconds}")
            payload["ack_wait"] = int(seconds) if seconds == int(seconds) else seconds
        return encode_payload(payload)

    @classmethod
    def read(cls, payload: Any) -> TaskAnnouncement:
        """Read what an announcement says, as decoded; the inverse of :meth:`encoded`.

        Raises:
            PayloadError: it says something else, or not in that very form.

        """
        keys = payload.keys() if type(payload) is dict else frozenset[str]()
        if "capabilities" not in keys or not keys <= {"capabilities", "ack_wait"}:
            raise PayloadError("an announcement says 'capabilities', may say 'ack_wait', and nothing else")
        seconds = _seconds(payload["ack_wait"]) if "ack_wait" in keys else None
        return cls(_capabilities(payload["capabilities"]), seconds)


def _capabilities(names: Any) -> tuple[str, ...]:
    if type(names) is not list or not 1 <= len(names) <= MAX_CONSUMERS:
        raise PayloadError(f"an announcement lists 1 to {MAX_CONSUMERS} capabilities")
    try:
        checked = tuple(check_capability(name) for name in names)
    except ConfigurationError as error:
        raise PayloadError(str(error)) from error
    if any(one >= other for one, other in pairwise(checked)):
        raise PayloadError("an announcement names each capability once, in order")
    return checked


def _seconds(value: Any) -> float:
    whole = type(value) is int
    # A whole number has one form only.
    if not whole and (type(value) is not float or value == value // 1):
        raise PayloadError("'ack_wait' is a number of seconds, and a whole one has no fraction")
    if not SHORTEST_ACK_WAIT_S <= value <= LONGEST_ACK_WAIT_S:
        raise PayloadError(_ACK_WAIT)
    return float(value)


class Announcer:
    """Announces an agent's capabilities for as long as somebody finds that their queues are not there.

    ``control`` is the control role of the broker's trust domain. One instance serves all of a worker's
    capabilities; whoever pulls any of them may use it. ``ack_wait_s`` is as in :class:`TaskAnnouncement`.

    Raises:
        ConfigurationError: no capability, or too many of them, or a time out of bounds.

    """

    def __init__(
        self,
        me: SpiffeID,
        control: SpiffeID,
        capabilities: Iterable[str],
        *,
        sealer: Sealer,
        clock_ms: Callable[[], int],
        ack_wait_s: float | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._control = control
        self._payload = TaskAnnouncement(tuple(capabilities), ack_wait_s).encoded()
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

    async def greet(self, session: Session) -> None:
        """Announce the capabilities on a new connection: what is there may be what another version needed."""
        try:
            await self.announce(session)
        except AgentWeaveError as error:  # who finds no queue announces them again
            _log.info("not announced on this connection: %s", error)

    async def _send(self, session: Session) -> None:
        await send_announcement(
            session,
            self._me,
            self._control,
            ANNOUNCE,
            self._payload,
            sealer=self._sealer,
            now_ms=self._clock_ms(),
        )


async def send_announcement(
    session: Session,
    me: SpiffeID,
    control: SpiffeID,
    what: str,
    payload: bytes,
    *,
    sealer: Sealer,
    now_ms: int,
) -> None:
    """Sign an announcement and publish it, once. ``what`` is the ``cap`` of its head.

    Raises:
        BusError: the connection is lost.
        SvidUnavailableError: there is no valid SVID to sign with.

    """
    subject = announce_subject(me)
    draft = Draft(
        kind=Kind.CONTROL,
        id=new_id(now_ms),
        aud=control,
        cap=what,
        sub=subject,
        iat=now_ms,
        exp=now_ms + _LIFETIME_MS,
    )
    sealed = await sealer.seal(draft, payload)
    await session.publish(subject, sealed.frame)
