"""Claims: one replica, once, may run a call that is not declared safe.

A claim is a message on a subject that only the called agent may publish to, in a stream that takes
one message a subject (``streams.claim_stream``). Whoever's message was stored holds the claim; a
second one is refused by the broker. That holds across replicas, restarts of workers and restarts of
the broker.

What is not trusted: an acknowledgement that says ``duplicate``, or one that came on another subject
than was asked with. What is unclear is reported as unavailable, and then nothing runs.
"""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from enum import Enum
from typing import Any, Final

from nats.aio.msg import Msg

from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.bus.streams import claim_stream_name
from agentweave_bus.bus.subjects import claim_subject
from agentweave_bus.exceptions import BusError, UnreachableError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["NEW_STREAM_S", "ClaimOutcome", "Claims", "PendingClaim"]

_WRONG_SEQUENCE: Final = 10071
_NOT_STORED: Final = 10077
_SUBJECT_FULL: Final = "maximum messages per subject exceeded"
"""JetStream's err_codes for a claim that is held, and how the second one says that it is for that reason:
it is the same for a stream that is full as a whole."""

_NOT_UNDERSTOOD: Final = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading an answer can raise that is no JSON, too deep, or of another shape than JetStream's."""

_TIMEOUT_S: Final = 5.0

NEW_STREAM_S: Final = 2.0
"""A call sealed this close to the making of a claim stream may have been claimed in its predecessor."""


class ClaimOutcome(Enum):
    """What came of trying to claim a call."""

    HELD = "held"
    CLAIMED = "claimed"
    """Someone, perhaps this agent before a restart, holds it already."""
    UNAVAILABLE = "unavailable"
    """The broker gave no clear answer, so the call must not run."""


class PendingClaim:
    """A claim that has been sent. Await :meth:`outcome`, or :meth:`abandon` it."""

    def __init__(
        self,
        claims: Claims | None = None,
        answer: asyncio.Future[Msg] | None = None,
        stream_ms: int | None = None,
    ) -> None:
        self._claims = claims
        self._answer = answer
        self._stream_ms = stream_ms

    async def outcome(self) -> ClaimOutcome:
        """Wait for the broker's word, within the time that a claim may take."""
        if self._claims is None or self._answer is None:
            return ClaimOutcome.UNAVAILABLE
        try:
            message = await asyncio.wait_for(self._answer, _TIMEOUT_S)
        except (BusError, TimeoutError):
            return ClaimOutcome.UNAVAILABLE
        return await self._claims.judge(message.data, self._stream_ms)

    def abandon(self) -> None:
        """Wait no more. The claim may stand all the same; nothing runs on it."""
        if self._answer is not None:
            self._answer.cancel()


class Claims:
    """Claims calls for one agent."""

    def __init__(self, me: SpiffeID, keeper: Keeper) -> None:
        self._me = me
        self._keeper = keeper
        self._info_subject = f"$JS.API.STREAM.INFO.{claim_stream_name(me)}"
        self._created_ms: int | None = None
        self._highest = 0
        self._confirmed = False  # by an answer that came after a claim of this session
        self._asking = asyncio.Lock()
        self._asked = 0

    async def on_session(self, session: Session) -> None:
        """Learn when the stream was made: a new broker may have a new, empty one."""
        self._confirmed = False  # what is known stands until then, or every claim under way would be unclear
        await self._learn(session)

    async def created_ms(self, now_ms: int) -> int | None:
        """When the stream was created, in milliseconds since the epoch; ``None`` if it can't be told.

        A call sealed before that may have been claimed in a stream that is lost, so it must not run. An age
        in the future keeps every call from running, so it is asked for again and not believed for good.
        """
        if self._created_ms is None or self._created_ms > now_ms:
            try:
                await self._learn(await self._keeper.session(_TIMEOUT_S))
            except UnreachableError:
                return None
        return self._created_ms

    async def begin(self, key: str, digest: bytes) -> PendingClaim:
        """Send the claim of the call ``key``, which records ``digest`` of its head.

        What came of it is the result's ``outcome()``, so that other work can be done meanwhile.
        """
        stream_ms = self._created_ms  # what the call was measured by
        try:
            session = await self._keeper.session(_TIMEOUT_S)
            answer = await session.post(claim_subject(self._me, key), digest)
            return PendingClaim(self, answer, stream_ms)
        except (BusError, UnreachableError):
            return PendingClaim()

    async def judge(self, answer: bytes, stream_ms: int | None) -> ClaimOutcome:
        """Say what the broker's ``answer`` to a claim means, for a call measured by the age ``stream_ms``.

        Sequence numbers grow. One that does not may be late, or of a stream that was made anew and has
        forgotten what was claimed; nor does the first one of a session say of which stream it is. Then the
        stream is asked once more for its age, which decides.
        """
        outcome, sequence = _outcome(answer)
        if outcome is not ClaimOutcome.HELD:
            return outcome
        if stream_ms is None or stream_ms != self._created_ms:
            return ClaimOutcome.UNAVAILABLE
        if sequence > self._highest and self._confirmed:
            self._highest = sequence
            return outcome
        await self._learn_anew()
        if self._created_ms == stream_ms:
            self._confirmed = True
            self._highest = max(self._highest, sequence)
            return outcome
        self._highest = 0
        return ClaimOutcome.UNAVAILABLE

    async def _learn_anew(self) -> None:
        """Ask for the stream's age; of many who want to know at once one asks, after the last has come."""
        asked_before = self._asked
        async with self._asking:
            if self._asked > asked_before:
                return
            self._asked += 1
            try:
                await self._learn(await self._keeper.session(_TIMEOUT_S))
            except UnreachableError:
                self._created_ms = None

    async def _learn(self, session: Session) -> None:
        try:
            answer = await session.ask(self._info_subject, b"", timeout_s=_TIMEOUT_S)
            created = json.loads(answer.data)["created"]
            self._created_ms = int(datetime.fromisoformat(_microseconds(created)).timestamp() * 1000)
        except (BusError, TimeoutError, *_NOT_UNDERSTOOD):
            self._created_ms = None


def _outcome(data: bytes) -> tuple[ClaimOutcome, int]:
    """Read an acknowledgement: what it says, and the sequence number of what was stored."""
    try:
        answer: Any = json.loads(data)
    except _NOT_UNDERSTOOD:
        return ClaimOutcome.UNAVAILABLE, 0  # also an empty answer: no stream listens there
    if not isinstance(answer, dict):
        return ClaimOutcome.UNAVAILABLE, 0
    if (error := answer.get("error")) is not None:
        claimed = isinstance(error, dict) and _says_claimed(error)
        return ClaimOutcome.CLAIMED if claimed else ClaimOutcome.UNAVAILABLE, 0
    sequence = answer.get("seq")
    if type(sequence) is not int or sequence < 1 or answer.get("duplicate"):
        return ClaimOutcome.UNAVAILABLE, 0
    return ClaimOutcome.HELD, sequence


def _says_claimed(error: dict[str, Any]) -> bool:
    code = error.get("err_code")
    return code == _WRONG_SEQUENCE or (code == _NOT_STORED and error.get("description") == _SUBJECT_FULL)


def _microseconds(rfc3339: str) -> str:
    """Cut the broker's nanoseconds, which ``fromisoformat`` does not take before Python 3.13."""
    head, dot, tail = rfc3339.partition(".")
    if not dot:
        return rfc3339
    digits = tail.rstrip("Z")
    return f"{head}.{digits[:6]:0<6}+00:00"
