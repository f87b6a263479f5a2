"""Blobs: what is too large for a message, stored apart in chunks, and fetched by a signed reference.

Whoever writes one has a stream for them, whose slots are written once, and says in each subject who may read
it. The stream is made when it is first needed: the broker then says that there is none, and the control role
is told. What lies there proves nothing: a chunk counts when it has the size and the SHA-256 that the
reference names, a blob when all its chunks do and the whole has the digest that was signed.

A blob is written before what refers to it. Stored again, it lies where it lay; where something else stands in
a slot (only who owns the broker, or has the writer's key, could have put it there) it is stored under another
key. Memory: what has come so far, and a few chunks.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from enum import Enum
from typing import Any, Final

import anyio

from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.bus.slots import SlotOutcome, Slots
from agentweave_bus.bus.streams import blob_stream_name
from agentweave_bus.bus.subjects import blob_subject
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.envelope import decode_payload
from agentweave_bus.envelope.blob import CHUNK_BYTES, BlobReference, blob_limits
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.exceptions import BlobError, BusError, NoResponderError, QueueFullError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["Blobs"]

_AT_ONCE: Final = 4
"""How many chunks are under way for one blob."""

_VARIANTS: Final = 4
_ANSWER_S: Final = 5.0
_LEAST_S: Final = 20.0
_LEAST_RATE: Final = 1024 * 1024
"""Bytes a second that any broker is expected to carry."""
_FIRST_PAUSE_S: Final = 0.05
_LAST_PAUSE_S: Final = 2.0
_ROOM_FOR_SUBJECT: Final = 2_048


class _Slot(Enum):
    """What came of writing a chunk."""

    STANDS = 1
    ANOTHER = 2


class Blobs:
    """Stores and fetches blobs for one identity.

    ``announce`` tells the control role that this identity needs a stream for them. ``max_bytes`` bounds each
    blob, both ways; ``patience_s`` is how long to wait for a stream that nobody has made yet.
    """

    def __init__(
        self,
        me: SpiffeID,
        keeper: Keeper,
        slots: Slots,
        *,
        announce: Callable[[Session], Awaitable[None]],
        max_bytes: int,
        patience_s: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.me = me
        self.max_bytes = max_bytes
        self.limits = blob_limits(max_bytes)
        """The bounds of a payload that travels by reference."""
        self._keeper = keeper
        self._slots = slots
        self._announce = announce
        self._patience_s = patience_s
        self._monotonic = monotonic

    async def put(
        self, reader: SpiffeID, data: bytes, purpose: str, *, timeout_s: float | None = None
    ) -> BlobReference:
        """Store ``data`` for ``reader`` within ``timeout_s`` seconds; return what to sign.

        Without ``timeout_s`` it takes as long as it may for its size. The same data for the same ``purpose``
        have the same reference. ``reader`` may be oneself.

        Raises:
            BlobError: they are more than ``max_bytes``.
            QueueFullError: the stream takes nothing more.
            NoResponderError: there is no stream, and nobody has made one.
            BusError: no clear answer in time, or something else stands wherever they could.
            UnreachableError: there is no connection to the broker.

        """
        if len(data) > self.max_bytes:
            raise BlobError(f"{len(data)} bytes; bus.max_blob_bytes lets {self.max_bytes} pass")
        timeout_s = _seconds_for(len(data)) if timeout_s is None else timeout_s
        until = self._monotonic() + timeout_s
        session = await self._keeper.session(timeout_s)
        chunk = min(CHUNK_BYTES, session.max_message_bytes - _ROOM_FOR_SUBJECT)
        for variant in range(_VARIANTS):
            reference = BlobReference.of(data, purpose, variant=variant, chunk=chunk)
            if await self._stored(reader, memoryview(data), reference, until):
                return reference
        raise BusError("something else stands wherever a large payload could be stored")

    async def fetch(self, writer: SpiffeID, reference: BlobReference) -> bytes:
        """Return what ``writer`` stored for this identity under a reference that it signed.

        It takes as long as it may for its size: 20 s, and one more for each MiB.

        Raises:
            BlobError: a chunk is missing, or is not what was signed.
            BusError: the broker does not answer, or does not let this identity read there.

        """
        until = self._monotonic() + _seconds_for(reference.size)
        data, whole = bytearray(), hashlib.sha256()
        sizes = list(reference.sizes())
        for first in range(0, len(sizes), _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, len(sizes)))
            for chunk in await self._chunks(writer, reference, numbers, sizes, until):
                whole.update(chunk)
                data += chunk
        if whole.digest() != reference.digest:
            raise BlobError("a large payload whose chunks are as signed, and the whole is not")
        return bytes(data)

    async def decode(self, data: bytes) -> Any:
        """Decode what was fetched, in a thread: a million items take a second or two. Raises PayloadError."""
        return await anyio.to_thread.run_sync(decode_payload, data, self.limits)

    # --- storing -----------------------------------------------------------------------------------------

    async def _stored(
        self, reader: SpiffeID, data: memoryview, reference: BlobReference, until: float
    ) -> bool:
        """Store all chunks; false if something else stands in the place of one."""
        outcomes: set[_Slot] = set()

        async def store(number: int) -> None:
            start = number * reference.chunk
            subject = blob_subject(self.me, reader, reference.key, number)
            outcomes.add(await self._write(subject, bytes(data[start : start + reference.chunk]), until))

        await store(0)  # alone, because there may be no stream yet
        for first in range(1, len(reference.chunks), _AT_ONCE):
            await _together(store, range(first, min(first + _AT_ONCE, len(reference.chunks))))
            if _Slot.ANOTHER in outcomes:
                return False
        return _Slot.ANOTHER not in outcomes

    async def _write(self, subject: str, chunk: bytes, until: float) -> _Slot:
        stream = blob_stream_name(self.me)
        patient_until = min(until, self._monotonic() + self._patience_s)
        pause = _FIRST_PAUSE_S
        while True:
            outcome = await self._slots.write(stream, subject, chunk, timeout_s=self._left(until))
            if outcome is SlotOutcome.WRITTEN:
                return _Slot.STANDS
            if outcome is SlotOutcome.FULL:
                raise QueueFullError(f"there is no room left for large payloads of {self.me}")
            now = self._monotonic()
            if outcome is SlotOutcome.NOWHERE:
                if now + pause > patient_until:
                    raise NoResponderError(
                        "there is no stream for this identity's large payloads: is a control role running?"
                    )
                await self._announce(await self._keeper.session(self._left(until)))
            elif (stands := await self._read(stream, subject, until)) is not None:
                return _Slot.STANDS if stands == chunk else _Slot.ANOTHER
            if now + pause > until:
                raise BusError(f"a large payload can't be stored: {outcome.value}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE_S)

    async def _read(self, stream: str, subject: str, until: float) -> bytes | None:
        try:
            stands = await self._slots.read(stream, subject, timeout_s=self._left(until))
        except BusError:
            return None
        return None if stands is None else stands.data

    def _left(self, until: float) -> float:
        return min(_ANSWER_S, max(0.001, until - self._monotonic()))

    # --- fetching ----------------------------------------------------------------------------------------

    async def _chunks(
        self, writer: SpiffeID, reference: BlobReference, numbers: range, sizes: list[int], until: float
    ) -> list[bytes]:
        """Return some chunks, each as it was signed."""
        got: dict[int, bytes] = {}

        async def read(number: int) -> None:
            got[number] = await self._chunk(writer, reference, number, sizes[number], until)

        await _together(read, numbers)
        return [got[number] for number in numbers]

    async def _chunk(
        self, writer: SpiffeID, reference: BlobReference, number: int, size: int, until: float
    ) -> bytes:
        stream = blob_stream_name(writer)
        subject = blob_subject(writer, self.me, reference.key, number)
        pause = _FIRST_PAUSE_S
        while True:
            try:
                stands = await self._slots.read(stream, subject, timeout_s=self._left(until))
                break
            except BusError:
                if self._monotonic() + pause > until:
                    raise
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE_S)
        if stands is None:
            raise BlobError(f"chunk {number} of a large payload is not there", missing=True)
        if len(stands.data) != size or sha256(stands.data) != reference.chunks[number]:
            raise BlobError(f"chunk {number} of a large payload is not what was signed")
        return stands.data


def _seconds_for(size: int) -> float:
    return _LEAST_S + size / _LEAST_RATE


async def _together(work: Callable[[int], Coroutine[Any, Any, None]], numbers: range) -> None:
    """Do the work for several chunks at once; when it fails for several, one of their errors is raised."""
    try:
        async with owned_tasks() as group:
            for number in numbers:
                group.start_soon(work, number)
    except BaseExceptionGroup as failures:
        raise _first_of(failures) from None


def _first_of(failures: BaseExceptionGroup) -> BaseException:
    """Return one of several failures: that of what never will be right before what may be."""
    wrong = (one for one in failures.exceptions if isinstance(one, BlobError) and not one.missing)
    return next(wrong, failures.exceptions[0])
