"""What a queue gives out: the bytes of a task or an event, and the word about it that the broker waits for.

A delivery that nobody acknowledges comes again, to this worker or to another one; so nothing is lost with a
worker, a connection or an answer.

What counts is where a message is delivered: to an inbox that nobody can guess, on the subject of the queue
that was asked. What the broker says of it (the acknowledgement subject, the number of deliveries, the time)
is believed only of that. Headers are believed in nothing that was stored.
"""

from __future__ import annotations

import logging
from typing import Final, NamedTuple

from nats.aio.msg import Msg

from agentweave_bus.bus.connection import Keeper
from agentweave_bus.exceptions import BusError, UnreachableError

__all__ = ["Acknowledgements", "Delivery", "read_delivery"]

_log = logging.getLogger(__name__)

_AT_ONCE_S: Final = 1.0
_RECONNECT_S: Final = 30.0
_NANOSECONDS: Final = 1_000_000_000

_ACK_TOKENS: Final = 9  # $JS ACK stream consumer delivered sequence sequence time pending
_ACK_TOKENS_OF_ACCOUNT: Final = 11  # the same with domain and account before the stream


class Delivery(NamedTuple):
    """A task as the broker gave it out.

    ``subject`` is where it was queued, ``delivered`` how often it has been given out, this time included,
    and ``stored_at_ms`` when it was stored (milliseconds since the epoch). ``sequence`` is its number in the
    stream.
    """

    data: bytes
    subject: str
    delivered: int
    stored_at_ms: int
    acknowledgement: str
    """The subject on which it is acknowledged."""
    sequence: int = 0


class Acknowledgements:
    """Tells the broker what became of deliveries, on whatever connection there is.

    None of it raises or waits for long: what the broker is not told, it asks again by delivering again.
    """

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    async def done(self, delivery: Delivery) -> None:
        """Say that the task has its outcome on record; the queue may forget it."""
        await self._tell(delivery, b"+ACK")

    async def back(self, delivery: Delivery, delay_s: float) -> None:
        """Have it delivered again after ``delay_s`` seconds."""
        await self._tell(delivery, b'-NAK {"delay": %d}' % int(delay_s * _NANOSECONDS))

    async def keep(self, delivery: Delivery) -> None:
        """Say that it is being worked on; the time for acknowledging it starts anew.

        Without a connection that waits for one: said late, too, it may keep the task from others.
        """
        await self._tell(delivery, b"+WPI", within_s=_RECONNECT_S)

    @property
    def connected_s(self) -> float:
        """For how many seconds the connection has stood on which they are told; 0 without one."""
        return self._keeper.connected_s

    async def _tell(self, delivery: Delivery, word: bytes, within_s: float = _AT_ONCE_S) -> None:
        try:
            session = await self._keeper.session(within_s)
            await session.publish(delivery.acknowledgement, word)
        except (BusError, UnreachableError) as error:
            _log.info("the broker could not be told %r; the task comes again: %s", word[:4], error)


def read_delivery(message: Msg) -> tuple[tuple[str, str], Delivery] | None:
    """Read which stream and consumer gave out a message, by where it is acknowledged.

    Whoever asked checks that it was those: another consumer's word is none of this one's deliveries.
    """
    tokens = message.reply.split(".")
    if len(tokens) >= _ACK_TOKENS_OF_ACCOUNT:
        del tokens[2:4]
    if len(tokens) < _ACK_TOKENS or tokens[:2] != ["$JS", "ACK"]:
        return None
    try:
        delivered, sequence, stored_ns = int(tokens[4]), int(tokens[5]), int(tokens[7])
    except ValueError:
        return None
    stored_ms = stored_ns // 1_000_000
    delivery = Delivery(message.data, message.subject, delivered, stored_ms, message.reply, sequence)
    return (tokens[2], tokens[3]), delivery
