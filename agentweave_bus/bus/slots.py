"""Slots: messages that are written once, and never again.

A stream of slots takes one message a subject, refuses a second one instead of replacing the first, and lets
nobody delete or purge (``streams.py`` declares them). So writing slot *n* of a log is a compare-and-set: of
all who want to write it, one does. That holds across replicas and restarts, and needs no header.

A write whose acknowledgement is lost is no riddle: what stands in the slot is read, and either it is these
very bytes or somebody else's. Reading asks for one subject, which is part of the subject asked on, so that
the broker's permissions say who may read what.

What is read is bytes of whoever could write there; who believes them has to verify them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from enum import Enum
from typing import Any, Final, NamedTuple

import orjson
from nats.aio.msg import Msg

from agentweave_bus.bus.connection import Keeper, NotPermittedError
from agentweave_bus.bus.streams import NOT_STORED, SUBJECT_FULL
from agentweave_bus.exceptions import BusError, UnreachableError

__all__ = [
    "NoStreamError",
    "NotReadableError",
    "SlotOutcome",
    "Slots",
    "StoredFrame",
    "acknowledged",
    "nanoseconds_of",
]

_NO_RESPONDERS: Final = "503"
_NOT_FOUND: Final = "404"

_ANSWER_S: Final = 5.0
_FIRST_PAUSE_S: Final = 0.05
_LAST_PAUSE_S: Final = 2.0


class NotReadableError(BusError):
    """The broker's permissions do not let this identity read what stands there, if anything does."""


class NoStreamError(BusError):
    """There is no such stream: whoever would write to it has never run here."""


class SlotOutcome(Enum):
    """What came of writing a slot."""

    WRITTEN = "written"
    TAKEN = "taken"
    """Something stands there: somebody else's, or one's own from an attempt whose answer was lost."""
    FULL = "full"
    """The stream takes nothing more."""
    NOWHERE = "nowhere"
    """There is no such stream."""
    UNCLEAR = "unclear"
    """No clear answer came; it may have been written."""


_WRITTEN: Final = SlotOutcome.WRITTEN  # Python 3.11 takes long to find a member in its enum


class StoredFrame(NamedTuple):
    """What stands in a slot, and when the broker says that it was stored (milliseconds since the epoch)."""

    data: bytes
    stored_at_ms: int


class Slots:
    """Reads and writes slots for one identity. ``monotonic`` (seconds) is what waiting is measured by."""

    def __init__(self, keeper: Keeper, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._keeper = keeper
        self._monotonic = monotonic

    async def read(self, stream: str, subject: str, *, timeout_s: float = _ANSWER_S) -> StoredFrame | None:
        """Return what stands in a slot, or ``None``.

        What it raises names no subject, for it may come before people; a note on it does.

        Raises:
            NotReadableError: the broker does not let this identity read there.
            NoStreamError: there is no such stream.
            BusError: no answer in ``timeout_s`` seconds, or none that can be read.

        """
        asked = f"$JS.API.DIRECT.GET.{stream}.{subject}"
        try:
            return _stored(await self._keeper.ask(asked, b"", timeout_s=timeout_s), stream, subject)
        except (TimeoutError, UnreachableError) as error:
            raise _noted(BusError("no answer from the broker"), stream, subject) from error
        except NotPermittedError as error:
            told = NotReadableError("the broker does not let this identity read there")
            raise _noted(told, stream, subject) from error

    async def write(
        self, stream: str, subject: str, frame: bytes, *, timeout_s: float = _ANSWER_S
    ) -> SlotOutcome:
        """Write a slot once, and say what came of it. It raises nothing: what is not clear is ``UNCLEAR``."""
        try:
            return acknowledged(await self._keeper.ask(subject, frame, timeout_s=timeout_s), stream)
        except (TimeoutError, BusError, UnreachableError):
            return SlotOutcome.UNCLEAR

    async def put(
        self, stream: str, subject: str, frame: bytes, *, deadline_s: float = 30.0
    ) -> StoredFrame | None:
        """Write a slot, whatever it takes, for ``deadline_s`` seconds.

        Returns ``None`` when ``frame`` stands there, by this writing or an earlier one; else what does.

        Raises:
            BusError: it could be neither written nor read in time, or the stream takes nothing more.

        """
        until = self._monotonic() + deadline_s
        pause = _FIRST_PAUSE_S
        while True:
            outcome = await self.write(stream, subject, frame, timeout_s=min(_ANSWER_S, deadline_s))
            if outcome is _WRITTEN:
                return None
            try:
                stands = await self.read(stream, subject, timeout_s=min(_ANSWER_S, deadline_s))
            except BusError:
                stands = None
            if stands is not None:
                return None if stands.data == frame else stands
            if outcome is SlotOutcome.FULL or self._monotonic() + pause >= until:
                raise BusError(f"{subject} can't be written: {outcome.value}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE_S)


def acknowledged(message: Msg, stream: str) -> SlotOutcome:
    """Read JetStream's acknowledgement of something that was to be stored in ``stream``."""
    if not message.data and _status(message) == _NO_RESPONDERS:
        return SlotOutcome.NOWHERE
    try:
        answer: Any = orjson.loads(message.data)
    except orjson.JSONDecodeError:
        return SlotOutcome.UNCLEAR
    if not isinstance(answer, dict):
        return SlotOutcome.UNCLEAR
    error = answer.get("error")
    if error is not None:
        return _refused(error)
    sequence = answer.get("seq")
    clear = answer.get("stream") == stream and type(sequence) is int and sequence > 0
    return _WRITTEN if clear and not answer.get("duplicate") else SlotOutcome.UNCLEAR


def nanoseconds_of(rfc3339: str) -> int:
    """Read the broker's way of writing a time; nanoseconds since the epoch.

    Raises:
        ValueError: it is no time.

    """
    seconds, _, fraction = rfc3339.removesuffix("Z").partition(".")
    whole = datetime.fromisoformat(f"{seconds}+00:00")
    return int(whole.timestamp()) * 1_000_000_000 + int(f"{fraction[:9]:0<9}" if fraction else 0)


def _refused(error: Any) -> SlotOutcome:
    if not isinstance(error, dict) or error.get("err_code") != NOT_STORED:
        return SlotOutcome.UNCLEAR
    return SlotOutcome.TAKEN if error.get("description") == SUBJECT_FULL else SlotOutcome.FULL


def _stored(message: Msg, stream: str, subject: str) -> StoredFrame | None:
    headers: Mapping[str, str] = message.headers or {}
    if "Nats-Stream" not in headers:
        if (status := _status(message)) == _NOT_FOUND:
            return None
        if status == _NO_RESPONDERS:
            raise _noted(NoStreamError("there is no such stream at the broker"), stream, subject)
        raise _noted(BusError(f"the broker can't read it: {status or 'no answer to that'}"), stream, subject)
    if headers["Nats-Stream"] != stream or headers.get("Nats-Subject") != subject:
        raise _noted(BusError("the broker answers with another message"), stream, subject)
    try:
        stored_ns = nanoseconds_of(headers["Nats-Time-Stamp"])
    except (KeyError, ValueError) as error:
        told = BusError("the broker does not say when it was stored")
        raise _noted(told, stream, subject) from error
    return StoredFrame(message.data, stored_ns // 1_000_000)


def _noted(error: BusError, stream: str, subject: str) -> BusError:
    error.add_note(f"read from stream {stream}: {subject}")
    return error


def _status(message: Msg) -> str | None:
    return None if message.data or not message.headers else message.headers.get("Status")
