"""What the broker says of its streams, and many of their messages at once: for the control role alone.

Nobody else may ask so: agents read slot by slot, each its own. What is read is bytes of whoever could write
there; who believes them has to verify them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from nats.aio.msg import Msg

from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.bus.slots import StoredFrame, nanoseconds_of
from agentweave_bus.bus.subjects import Family
from agentweave_bus.exceptions import BusError, UnreachableError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.pulling import unguessable_inbox

__all__ = ["Batch", "ConsumerFigures", "StoredMessage", "StreamFigures", "StreamReader"]

_ANSWER_S: Final = 5.0
_MOST_BYTES: Final = 4 * 1024 * 1024
_MOST_PAGES: Final = 64
_NOTHING: Final = frozenset({"404", "503"})
"""No such message, and no such stream."""

_NO_STREAM: Final = 10059


class StreamFigures(NamedTuple):
    """A stream's numbers, by the broker's word; ``last`` is that of the last message that there ever was."""

    name: str
    messages: int
    first: int
    last: int


class ConsumerFigures(NamedTuple):
    """A consumer's numbers, by the broker's word; ``waiting`` is how many requests wait for messages."""

    subject: str
    pending: int
    in_flight: int
    redelivered: int
    waiting: int


class StoredMessage(NamedTuple):
    """A message of a stream: on which subject, its number there, and what it is."""

    subject: str
    number: int
    frame: StoredFrame


class Batch(NamedTuple):
    """Messages in the order in which they were stored, and how many there are behind them.

    ``last`` is the number of the last message that the server knew which has answered, 0 if it had none to
    give. Of a cluster it may be behind the others.
    """

    messages: list[StoredMessage]
    pending: int
    last: int


class StreamReader:
    """Asks the broker about streams. Everything is bounded: pages, bytes and time."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    async def streams(self, pattern: str) -> list[StreamFigures]:
        """Return the numbers of all streams for subjects that ``pattern`` covers. Raises BusError."""
        found = await self._listed("$JS.API.STREAM.LIST", "streams", {"subject": pattern})
        try:
            return [_stream(one) for one in found]
        except (KeyError, TypeError, ValueError) as error:
            raise BusError("what the broker says of its streams is not understood") from error

    async def streams_of(
        self, agents: Iterable[SpiffeID], family: Family, name_of: Callable[[SpiffeID], str]
    ) -> dict[SpiffeID, StreamFigures]:
        """Return the streams of a family that those of ``agents`` have, in the order of the agents' names.

        Raises BusError.
        """
        named = {name_of(one): one for one in agents}
        found = await self.streams(f"aw.{family}.>")
        mine = ((named[one.name], one) for one in found if one.name in named)
        return dict(sorted(mine, key=lambda pair: pair[0]))

    async def consumers(self, stream: str) -> list[ConsumerFigures]:
        """Return the numbers of a stream's consumers; none if there is no such stream. Raises BusError."""
        found = await self._listed(f"$JS.API.CONSUMER.LIST.{stream}", "consumers", {})
        try:
            return [_consumer(one) for one in found]
        except (KeyError, TypeError, ValueError) as error:
            raise BusError("what the broker says of its consumers is not understood") from error

    async def batch(self, stream: str, pattern: str, *, after: int, most: int) -> Batch:
        """Return up to ``most`` messages on subjects of ``pattern``, behind number ``after``.

        There are fewer where they are large. Raises BusError.
        """
        wanted = {"seq": after + 1, "next_by_subj": pattern, "batch": most, "max_bytes": _MOST_BYTES}
        return await self._many(stream, wanted)

    async def these(self, stream: str, subjects: list[str]) -> list[StoredMessage]:
        """Return what stands on ``subjects``, as far as there is something. Raises BusError."""
        if not subjects:
            return []
        wanted = {"multi_last": subjects, "batch": len(subjects), "max_bytes": _MOST_BYTES}
        return (await self._many(stream, wanted)).messages

    async def count(self, stream: str, pattern: str) -> int:
        """Return how many messages there are on subjects of ``pattern``. Raises BusError."""
        batch = await self._many(stream, {"seq": 1, "next_by_subj": pattern, "batch": 1})
        return len(batch.messages) + batch.pending

    async def _listed(self, subject: str, what: str, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for _ in range(_MOST_PAGES):
            body = json.dumps(wanted | {"offset": len(found)}).encode()
            try:
                answer = json.loads((await self._keeper.ask(subject, body, timeout_s=_ANSWER_S)).data)
                if answer.get("error", {}).get("err_code") == _NO_STREAM:
                    return found
                page, total = answer[what] or [], int(answer["total"])
            except (TimeoutError, UnreachableError) as error:
                raise BusError("no answer from the broker") from error
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise BusError(f"the broker does not say which {what} there are") from error
            found += page
            if not page or len(found) >= total:
                return found
        raise BusError(f"there are too many {what}")

    async def _many(self, stream: str, wanted: dict[str, Any]) -> Batch:
        try:
            async with asyncio.timeout(_ANSWER_S):
                session = await self._keeper.session(_ANSWER_S)
                return await self._gathered(session, stream, wanted)
        except (TimeoutError, UnreachableError) as error:
            raise BusError("no answer from the broker") from error

    async def _gathered(self, session: Session, stream: str, wanted: dict[str, Any]) -> Batch:
        """Ask for several messages, each of which comes by itself, and behind them that there are no more."""
        over: asyncio.Future[tuple[int, int]] = asyncio.get_running_loop().create_future()
        # The message with which the broker comes to what was asked for is given whole.
        answers = _Answers(stream, wanted["batch"], _MOST_BYTES + session.max_message_bytes, over)
        inbox = unguessable_inbox(session.me, session)
        end = await session.receive_pulled(inbox, answers.take)
        try:
            session.watch(over)
            await session.publish(f"$JS.API.DIRECT.GET.{stream}", json.dumps(wanted).encode(), inbox)
            return Batch(answers.messages, *await over)
        finally:
            over.cancel()
            await end()


class _Answers:
    """Several answers to one question, ``most`` of ``size`` bytes at most: honest brokers give no more.

    The last says how many there are behind them, up to which.
    """

    def __init__(self, stream: str, most: int, size: int, over: asyncio.Future[tuple[int, int]]) -> None:
        self.messages: list[StoredMessage] = []
        self._stream = stream
        self._most = most
        self._left = size
        self._over = over

    async def take(self, message: Msg) -> None:
        """Take one of them."""
        if self._over.done():
            return
        headers: Mapping[str, str] = message.headers or {}
        try:
            if "Nats-Stream" in headers:
                self._left -= len(message.data)
                if len(self.messages) >= self._most or self._left < 0:
                    raise BusError("the broker gives more than it was asked for")  # noqa: TRY301
                self.messages.append(_stored(self._stream, headers, message.data))
            elif (status := headers.get("Status", "")) in _NOTHING:
                self._over.set_result((0, 0))
            elif status == "204":
                told = int(headers["Nats-Num-Pending"]), int(headers["Nats-Last-Sequence"])
                self._over.set_result(told)
            else:
                self._over.set_exception(
                    BusError(f"the broker can't read it: {status or 'no answer to that'}")
                )
        except BusError as error:
            self._over.set_exception(error)
        except (KeyError, ValueError) as error:
            why = f"the broker answers with what is not understood: {error!r}"
            self._over.set_exception(BusError(why))


def _stored(stream: str, headers: Mapping[str, str], data: bytes) -> StoredMessage:
    if headers["Nats-Stream"] != stream:
        raise BusError("the broker answers with another stream's message")
    stored_at_ms = nanoseconds_of(headers["Nats-Time-Stamp"]) // 1_000_000
    return StoredMessage(
        headers["Nats-Subject"], int(headers["Nats-Sequence"]), StoredFrame(data, stored_at_ms)
    )


def _stream(told: dict[str, Any]) -> StreamFigures:
    state = told["state"]
    numbers = (int(state[name]) for name in ("messages", "first_seq", "last_seq"))
    return StreamFigures(str(told["config"]["name"]), *numbers)


def _consumer(told: dict[str, Any]) -> ConsumerFigures:
    names = ("num_pending", "num_ack_pending", "num_redelivered", "num_waiting")
    return ConsumerFigures(str(told["config"]["filter_subject"]), *(int(told[name]) for name in names))
