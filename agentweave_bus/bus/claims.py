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

import anyio
from nats.aio.msg import Msg

from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.bus.streams import NOT_STORED, SUBJECT_FULL, claim_stream_name
from agentweave_bus.bus.subjects import claim_subject
from agentweave_bus.exceptions import BusError, UnreachableError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["NEW_STREAM_S", "ClaimOutcome", "Claims", "PendingClaim", "StreamAge"]

_WRONG_SEQUENCE: Final = 10071
"""JetStream's err_code for a claim that is held, under the rule of a header; see docs/decisions/0004."""

_NOT_UNDERSTOOD: Final = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading an answer can raise that is no JSON, too deep, or of another shape than JetStream's."""

_TIMEOUT_S: Final = 5.0

_PART_OF_CONNECTING: Final = 0.25
"""Of the time that is left for connecting, the part after which a session opens without knowing the age."""

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
        age: StreamAge | None = None,
    ) -> None:
        self._claims = claims
        self._answer = answer
        self._stream_ms = stream_ms
        self._age = age

    async def outcome(self) -> ClaimOutcome:
        """Wait for the broker's word, within the time that a claim may take."""
        if self._claims is None or self._answer is None or self._age is None:
            return ClaimOutcome.UNAVAILABLE
        try:
            message = await asyncio.wait_for(self._answer, _TIMEOUT_S)
        except (BusError, TimeoutError):
            return ClaimOutcome.UNAVAILABLE
        return await self._claims.judge(message.data, self._stream_ms, self._age)

    def abandon(self) -> None:
        """Wait no more. The claim may stand all the same; nothing runs on it."""
        if self._answer is not None:
            self._answer.cancel()


class StreamAge:
    """What one session has told of the stream. Another session may lead to another stream."""

    def __init__(self, session: Session, subject: str) -> None:
        self.session = session
        self.confirmed = False  # by an answer that came after a claim on this session
        self.highest = 0  # the largest sequence number of a claim on this session
        self._subject = subject
        self._asking = asyncio.Lock()
        self._begun = 0
        self._answered = 0
        self._told: int | None = None

    async def ask(self, *, anew: bool) -> int | None:
        """Return when the stream was made, in milliseconds since the epoch; ``None`` if it can't be told.

        Of many who want to know at once one asks. With ``anew`` only a question that begins from now on
        counts, else also one that is under way.
        """
        first_that_counts = self._begun + (1 if anew or not self._asking.locked() else 0)
        async with self._asking:
            if self._answered < first_that_counts:  # also if who asked was cancelled
                self._begun = number = self._begun + 1
                self._told = await _created_ms(self.session, self._subject, _TIMEOUT_S)
                self._answered = number
            return self._told


class Claims:
    """Claims calls for one agent."""

    def __init__(self, me: SpiffeID, keeper: Keeper) -> None:
        self._me = me
        self._keeper = keeper
        self._info_subject = f"$JS.API.STREAM.INFO.{claim_stream_name(me)}"
        self._created_ms: int | None = None
        self._age: StreamAge | None = None  # of the session on which claims are sent now

    async def on_session(self, session: Session) -> None:
        """Learn when the stream was made: a new broker may have a new, empty one.

        That is a head start and no more, so it takes a part only of the time for connecting. Without an
        answer what is known stands, or every claim under way would be unclear; the first claim of the
        session is measured by an age that is asked for after it in any case.
        """
        left_s = anyio.current_effective_deadline() - anyio.current_time()
        created_ms = await _created_ms(
            session, self._info_subject, min(_TIMEOUT_S, left_s * _PART_OF_CONNECTING)
        )
        if created_ms is not None:
            self._created_ms = created_ms

    async def created_ms(self, now_ms: int) -> int | None:
        """When the stream was created, in milliseconds since the epoch; ``None`` if it can't be told.

        A call sealed before that may have been claimed in a stream that is lost, so it must not run. An age
        in the future keeps every call from running, so it is asked for again and not believed for good.
        """
        if self._created_ms is None or self._created_ms > now_ms:
            try:
                age = self._age_by(await self._keeper.session(_TIMEOUT_S))
            except UnreachableError:
                return None
            self._note(age, await age.ask(anew=False))
        return self._created_ms

    async def begin(self, key: str, digest: bytes) -> PendingClaim:
        """Send the claim of the call ``key``, which records ``digest`` of its head.

        What came of it is the result's ``outcome()``, so that other work can be done meanwhile.
        """
        stream_ms = self._created_ms  # what the call was measured by
        try:
            session = await self._keeper.session(_TIMEOUT_S)
            age = self._age_by(session)
            answer = await session.post(claim_subject(self._me, key), digest)
            return PendingClaim(self, answer, stream_ms, age)
        except (BusError, UnreachableError):
            return PendingClaim()

    async def judge(self, answer: bytes, stream_ms: int | None, age: StreamAge) -> ClaimOutcome:
        """Say what the broker's ``answer`` to a claim means, for a call measured by the age ``stream_ms``.

        Sequence numbers grow. One that does not may be late, or of a stream that was made anew and has
        forgotten what was claimed; nor does the first one of a session say of which stream it is. Then the
        claim's own session, of which ``age`` is, asks once more for the stream's age, which decides.
        """
        outcome, sequence = _outcome(answer)
        if outcome is not ClaimOutcome.HELD:
            return outcome
        if stream_ms is None or stream_ms != self._created_ms:
            return ClaimOutcome.UNAVAILABLE
        if sequence > age.highest and age.confirmed:
            age.highest = sequence
            return outcome
        created_ms = await age.ask(anew=True)
        self._note(age, created_ms)
        age.confirmed = created_ms == stream_ms
        if not age.confirmed:
            age.highest = 0
            return ClaimOutcome.UNAVAILABLE
        age.highest = max(age.highest, sequence)
        return outcome

    def _age_by(self, session: Session) -> StreamAge:
        """Return what ``session``, the current one, has told; claims under way keep that of their own."""
        if self._age is None or self._age.session is not session:
            self._age = StreamAge(session, self._info_subject)
        return self._age

    def _note(self, age: StreamAge, created_ms: int | None) -> None:
        """Measure calls by ``created_ms`` from now on, unless a retired session said so."""
        if age is self._age:
            self._created_ms = created_ms


async def _created_ms(session: Session, subject: str, timeout_s: float) -> int | None:
    """Ask a session when the stream was made; ``None`` for no answer in time, or none that can be read."""
    try:
        answer = await session.ask(subject, b"", timeout_s=timeout_s)
        created = json.loads(answer.data)["created"]
        return int(datetime.fromisoformat(_microseconds(created)).timestamp() * 1000)
    except (BusError, TimeoutError, *_NOT_UNDERSTOOD):
        return None


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
    return code == _WRONG_SEQUENCE or (code == NOT_STORED and error.get("description") == SUBJECT_FULL)


def _microseconds(rfc3339: str) -> str:
    """Cut the broker's nanoseconds, which ``fromisoformat`` does not take before Python 3.13."""
    head, dot, tail = rfc3339.partition(".")
    if not dot:
        return rfc3339
    digits = tail.rstrip("Z")
    return f"{head}.{digits[:6]:0<6}+00:00"
