"""Progress: what a worker tells of a task before its outcome, written into slots and read again.

A message of progress is an envelope of kind ``progress``: from the agent to the submitter (``aud``), about
one task (``re``), and a link of a chain (``seq`` and ``prev``). It tells how far the task is, or carries an
artifact. How many there were, and the digest of the last, stand in the record of the task's outcome, so that
who reads them sees whether something is missing.

A task that is tried again begins at its beginning, and says again what an earlier attempt has said.
:class:`Replay` keeps that from those who watch: they were told.

Progress decides nothing. So it is read more leniently than records: what is genuine counts, and what is
missing between two messages is told as a gap. What is not genuine is passed over, counted and logged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agentweave_bus.bus.slots import StoredFrame
from agentweave_bus.bus.streams import PROGRESS_MAX_AGE_S, progress_stream_name
from agentweave_bus.bus.subjects import progress_subject
from agentweave_bus.envelope import (
    Draft,
    Kind,
    OpenedEnvelope,
    check_time_stored,
    decode_payload,
    encode_payload,
    new_id,
)
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.exceptions import (
    AttemptLostError,
    BusError,
    EnvelopeError,
    FederationError,
    IdentityError,
    MalformedEnvelopeError,
    PayloadError,
)
from agentweave_bus.tasks.log import Desk
from agentweave_bus.tasks.record import ProgressMark, TaskRef
from agentweave_bus.types import Artifact

__all__ = ["Progress", "ProgressBody", "ProgressChain", "ProgressWriter", "Replay"]

_log = logging.getLogger(__name__)

_INTERVAL_S: Final = 0.1
_WRITE_S: Final = 5.0
_MOST_FOREIGN: Final = 64
_MOST_WORDS: Final = 1_000
_MOST_ENTRIES: Final = 1_000_000
_LIFETIME_MS: Final = PROGRESS_MAX_AGE_S * 1000

_Text = Annotated[str, Field(strict=True, max_length=1_000)]


class ArtifactBody(BaseModel):
    """An artifact as it travels: what it is in the agent's own words, and its data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: _Text
    data: Any
    name: _Text | None = None
    description: _Text | None = None

    def to_artifact(self) -> Artifact:
        """Return it as a result has it."""
        made: Artifact = {"type": self.type, "data": self.data}
        if self.name is not None:
            made["name"] = self.name
        if self.description is not None:
            made["description"] = self.description
        return made


class ProgressBody(BaseModel):
    """The payload of a message of progress: of which attempt it is, and a fraction or an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    v: Literal[1] = 1
    attempt: Annotated[int, Field(strict=True, ge=1, le=2**53 - 1)]
    fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    message: _Text | None = None
    artifact: ArtifactBody | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if (self.fraction is None) == (self.artifact is None):
            raise ValueError("progress is a fraction or an artifact")
        return self

    def encoded(self) -> bytes:
        """Return it as an envelope's payload. Raises PayloadError."""
        return encode_payload(self.model_dump(exclude_none=True))


class Progress(NamedTuple):
    """A message of progress that was verified. ``at_ms`` is when it was signed, since the epoch."""

    number: int
    """The how many-th of its task, from 0; what is missing is counted, too."""
    slot: int
    body: ProgressBody
    digest: bytes
    at_ms: int


class ProgressChain:
    """Reads the progress in one task, from a place in its slots on: ``slot`` and ``number`` are the next.

    ``task`` is the digest of the task's head, and ``digest`` that of the message before, where that is known.
    """

    def __init__(
        self,
        desk: Desk,
        ref: TaskRef,
        task: bytes,
        *,
        slot: int = 0,
        number: int = 0,
        digest: bytes | None = None,
    ) -> None:
        self.ref = ref
        self.task = task
        self.slot = slot
        self.number = number
        self.digest = digest
        self._desk = desk
        self._stream = progress_stream_name(ref.agent)
        self._foreign = 0

    @property
    def stream(self) -> str:
        """The name of the stream in which it stands."""
        return self._stream

    def subject(self) -> str:
        """Where the next message stands, or will stand."""
        return progress_subject(self.ref.agent, self.ref.sender, self.ref.key, self.slot)

    async def next(self) -> Progress | None:
        """Read the next message; ``None`` if there is none yet.

        Raises:
            BusError: the broker does not answer, or there is more in the slots than any task can have made.

        """
        while self.slot < _MOST_ENTRIES:
            stands = await self._desk.slots.read(self._stream, self.subject())
            if stands is None:
                return None
            if (entry := self.take(stands)) is not None:
                return entry
        raise BusError(f"more than {_MOST_ENTRIES} messages of progress in task {self.ref.id}")

    def take(self, stands: StoredFrame) -> Progress | None:
        """Take what stands in the next slot for progress, or pass it over. Raises BusError."""
        slot = self.slot
        try:
            entry = self._read(stands, slot)
        except (EnvelopeError, PayloadError, IdentityError, FederationError) as error:
            self._pass_over(slot, error)
            return None
        self.slot, self.number, self.digest = slot + 1, entry.number + 1, entry.digest
        return entry

    def wrote(self, digest: bytes) -> None:
        """Note that one's own message, whose head has this digest, stands in the next slot."""
        self.slot, self.number, self.digest = self.slot + 1, self.number + 1, digest

    def _read(self, stands: StoredFrame, slot: int) -> Progress:
        desk, now_ms = self._desk, self._desk.clock_ms()
        opened = desk.verifier.open_stored(stands.data, now_ms=now_ms, stored_at_ms=stands.stored_at_ms)
        check_time_stored(opened, now_ms=now_ms, stored_at_ms=stands.stored_at_ms)
        self._check_head(opened)
        try:
            body = ProgressBody.model_validate(decode_payload(opened.payload))
        except ValidationError as error:
            raise MalformedEnvelopeError("progress whose payload is none") from error
        return Progress(opened.head.seq or 0, slot, body, opened.digest, opened.head.iat)

    def _check_head(self, opened: OpenedEnvelope) -> None:
        head, ref = opened.head, self.ref
        number = head.seq or 0
        fits = (
            head.kind is Kind.PROGRESS
            and head.iss == ref.agent
            and head.aud == ref.sender
            and head.cap == ref.capability
            and head.sub == self.subject()
            and head.re == self.task
            and number >= self.number
            and (number > self.number or self.digest in (None, head.prev))
            and not opened.via
        )
        if not fits:
            raise MalformedEnvelopeError("an envelope that is no progress of this place and task")

    def _pass_over(self, slot: int, error: Exception) -> None:
        self.slot = slot + 1
        self._foreign += 1
        self._desk.on_foreign()
        _log.error("what stands in progress %d of %r is not believed: %s", slot, self.ref, error)
        if self._foreign > _MOST_FOREIGN:
            raise BusError(f"the progress of task {self.ref.id} is full of what is none") from error


class Replay:
    """What earlier attempts have told, and whether the present one tells anything new.

    It is silent until it comes to what was told last, or beyond: to a higher fraction than any, or to the
    highest in other words. From then on all is new. Artifacts are new if they are not the same, byte for
    byte, as one that an earlier attempt has handed over; the same twice in one attempt are two.
    """

    def __init__(self) -> None:
        self._silent = False
        self._highest = -1.0
        self._words: set[str | None] = set()  # with which the highest was told
        self._last: tuple[float, str | None] | None = None
        self._artifacts: Counter[bytes] = Counter()

    def add(self, body: ProgressBody) -> None:
        """Note what an earlier attempt has told."""
        if body.artifact is not None:
            self._artifacts[_digest_of(body.artifact)] += 1
        elif body.fraction is not None:
            self._silent, self._last = True, (body.fraction, body.message)
            if body.fraction > self._highest:
                self._highest, self._words = body.fraction, set()
            if body.fraction == self._highest and len(self._words) < _MOST_WORDS:
                self._words.add(body.message)

    def is_news(self, body: ProgressBody) -> bool:
        """Say whether what this attempt tells now was not told before."""
        if body.artifact is not None:
            return self._is_new_artifact(body.artifact)
        assert body.fraction is not None  # else it tells an artifact
        if not self._silent:
            return True
        as_high = body.fraction == self._highest and body.message not in self._words
        beyond = body.fraction > self._highest or as_high
        self._silent = not beyond and (body.fraction, body.message) != self._last
        return beyond

    def _is_new_artifact(self, artifact: ArtifactBody) -> bool:
        if not self._artifacts:
            return True
        digest = _digest_of(artifact)
        if not self._artifacts[digest]:
            return True
        self._artifacts[digest] -= 1
        return False


def _digest_of(artifact: ArtifactBody) -> bytes:
    return sha256(encode_payload(artifact.model_dump(exclude_none=True)))


class ProgressWriter:
    """Writes the progress of one attempt at a task, the ``attempt``-th (counted from 1).

    What the attempts from ``since`` on have told before is not told again, see :class:`Replay`; with a
    redrive the task begins anew, and so does its progress.

    Of what is told in quick succession ten a second are written, the last one always; artifacts are written
    all. Call :meth:`finish` when the handler has ended; after that :meth:`mark` says what the record of the
    outcome has to say.
    """

    def __init__(
        self,
        desk: Desk,
        ref: TaskRef,
        task: bytes,
        attempt: int = 1,
        *,
        since: int = 1,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desk = desk
        self._attempt = attempt
        self._chain = ProgressChain(desk, ref, task)
        self._monotonic = monotonic
        self._writing = asyncio.Lock()
        self._latest: ProgressBody | None = None
        self._written_at = float("-inf")
        self._telling: asyncio.Task[None] | None = None
        self._finishing = asyncio.Event()
        self._lost = False
        self._since = since
        self._replay = Replay()
        self._recalled = attempt <= since

    async def progress(self, fraction: float, message: str = "") -> None:
        """Tell that ``fraction`` (0 to 1) is done. It is written soon, unless a later one takes its place.

        The first time in a later attempt it waits until what was told before is read, for 5 s at most.

        Raises:
            AttemptLostError: another worker has the task now.
            PayloadError: the fraction is no such number, or the message is longer than 1,000 characters.

        """
        self._check_mine()
        if self._finishing.is_set():
            return
        body = self._body(fraction=fraction, message=message or None)
        await self._recall()
        if not self._replay.is_news(body):
            return
        self._latest = body
        if self._telling is None or self._telling.done():
            self._telling = asyncio.get_running_loop().create_task(self._tell())

    async def artifact(self, artifact: Artifact) -> None:
        """Hand over a part of the result. It is stored when this returns, by this attempt or an earlier one.

        Raises:
            AttemptLostError: another worker has the task now.
            PayloadError: it is no artifact, or too large.
            BusError: it could not be stored.

        """
        self._check_mine()
        body = self._body(artifact=dict(artifact))
        await self._recall()
        if not self._replay.is_news(body):
            return
        await self._tell_latest()  # which was told before it
        await self._write(body)

    async def finish(self) -> None:
        """Write what was told last. Gives up after some seconds: progress must not hold up an outcome."""
        self._finishing.set()
        telling, self._telling = self._telling, None
        if telling is None:
            return
        try:
            async with asyncio.timeout(2 * _WRITE_S):
                await telling
        except TimeoutError:
            _log.warning("the last progress of %r could not be written in time", self._chain.ref)
        finally:
            telling.cancel()

    def mark(self) -> ProgressMark | None:
        """How much progress stands: the number of messages and the digest of the last."""
        digest = self._chain.digest
        return None if digest is None else ProgressMark(count=self._chain.number, digest=digest.hex())

    async def _recall(self) -> None:
        """Read what earlier attempts have told, once; what can't be read in time is told again."""
        if self._recalled:
            return
        async with self._writing:
            try:
                async with asyncio.timeout(_WRITE_S):
                    while not self._recalled:
                        self._recalled = await self._recall_next()
            except BusError as error:
                _log.warning("some progress of %r is told again: %s", self._chain.ref, error)
            except TimeoutError:
                _log.warning("some progress of %r is told again: there is too much to read", self._chain.ref)
            self._recalled = True
        self._check_mine()

    async def _recall_next(self) -> bool:
        """Read one message; return whether there was none."""
        entry = await self._chain.next()
        if entry is None:
            return True
        if entry.body.attempt > self._attempt:
            self._lost = True
        elif self._since <= entry.body.attempt < self._attempt:
            self._replay.add(entry.body)
        return False

    def _check_mine(self) -> None:
        if self._lost:
            raise AttemptLostError("another attempt has begun")

    def _body(self, **values: Any) -> ProgressBody:
        try:
            return ProgressBody(attempt=self._attempt, **values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise PayloadError(f"progress: {place or 'it'}: {first['msg']}") from error

    async def _tell(self) -> None:
        """Write the latest, and what takes its place meanwhile, at most ten a second."""
        while self._latest is not None:
            left = self._written_at + _INTERVAL_S - self._monotonic()
            if left > 0 and not self._finishing.is_set():
                await _event_or(self._finishing, left)
            await self._tell_latest()

    async def _tell_latest(self) -> None:
        body, self._latest = self._latest, None
        if body is None:
            return
        try:
            await self._write(body)
        except AttemptLostError:
            _log.info("progress of %r is not told: another attempt has begun", self._chain.ref)
        except (BusError, PayloadError, EnvelopeError, IdentityError) as error:
            _log.warning("progress of %r is not told: %s", self._chain.ref, error)
        self._written_at = self._monotonic()

    async def _write(self, body: ProgressBody) -> None:
        payload, chain, desk = body.encoded(), self._chain, self._desk
        async with self._writing:
            self._check_mine()
            while True:
                sealed = await desk.sealer.seal(self._draft(), payload)
                stands = await desk.slots.put(
                    chain.stream, sealed.head.sub, sealed.frame, deadline_s=_WRITE_S
                )
                if stands is None:
                    chain.wrote(sealed.digest)
                    return
                entry = chain.take(stands)
                if entry is not None and entry.body.attempt > self._attempt:
                    self._lost = True
                    raise AttemptLostError("another attempt has begun")

    def _draft(self) -> Draft:
        chain, ref, now_ms = self._chain, self._chain.ref, self._desk.clock_ms()
        return Draft(
            kind=Kind.PROGRESS,
            id=new_id(now_ms),
            aud=ref.sender,
            cap=ref.capability,
            sub=chain.subject(),
            iat=now_ms,
            exp=now_ms + _LIFETIME_MS,
            re=chain.task,
            seq=chain.number,
            prev=chain.digest if chain.number else None,
            log=self._desk.witness(),
        )


async def _event_or(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
