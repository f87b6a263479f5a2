"""Pull consumers in memory: what is given out, when it comes again, and when it is given up.

A message that was given out stays pending until it is acknowledged, also while it waits to be given out
again: when its time is up (``ack_wait``, or the entry of ``backoff`` for that attempt), at once or after a
delay when it is given back. Its time starts anew with each sign of progress. After ``max_deliver`` attempts
it comes no more, and an advisory says so. Times run by the event loop's clock, so that a virtual one drives
them.

As with the real one an acknowledgement is of a message and not of an attempt: whoever was given it earlier
can still acknowledge it, give it back or end it.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, Final, Protocol

from agentweave_bus.testing.memory_configs import consumer_config, filters
from agentweave_bus.testing.memory_messages import Router, Stored, rfc3339
from agentweave_bus.testing.memory_requests import Requests
from agentweave_bus.testing.memory_subjects import matches_any

__all__ = ["Consumer", "Source"]

_NANOSECONDS: Final = 1_000_000_000
_TOGETHER: Final = 0.001
"""What is due within so many seconds comes again in the order in which it was stored."""


class Source(Protocol):
    """The stream that a consumer reads."""

    messages: OrderedDict[int, Stored]
    last_sequence: int

    @property
    def name(self) -> str:
        """The stream's name."""

    def expire(self) -> None:
        """Drop what is older than the stream keeps."""

    def done_with(self, sequence: int) -> None:
        """Note that a consumer needs a message no more."""


@dataclass(slots=True)
class _Pending:
    """A message that was given out and is not acknowledged.

    ``number`` is the consumer's sequence of its first attempt, ``due`` the loop's time when it comes again.
    """

    number: int
    due: float | None = None


class Consumer:
    """One durable pull consumer of ``stream``, with explicit acknowledgements.

    Raises:
        ApiError: its declaration is refused.

    """

    def __init__(
        self, stream: Source, name: str, config: dict[str, Any], router: Router, created_ns: int
    ) -> None:
        self.config = consumer_config(name, config)
        self._created_ns = created_ns
        self._stream = stream
        self._name = name
        self._router = router
        self._filters = filters(self.config)
        self._next = self._first()
        self._unseen: OrderedDict[int, None] = OrderedDict()
        self._again: OrderedDict[int, None] = OrderedDict()
        self._pending: OrderedDict[int, _Pending] = OrderedDict()  # in the order of the stream
        self._repeats: dict[int, int] = {}
        self._requests = Requests(router, self.config["max_waiting"], self._place)
        self._dues: list[tuple[float, int]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._count = 0
        self._last_given = self._next - 1
        self._floor = (0, self._next - 1)
        self._look_over()

    def info(self) -> dict[str, Any]:
        """Describe the consumer as the API does."""
        self._stream.expire()
        self._requests.look()
        return {
            "stream_name": self._stream.name,
            "name": self._name,
            "created": rfc3339(self._created_ns),
            "config": self.config,
            "delivered": {"consumer_seq": self._count, "stream_seq": self._last_given},
            "ack_floor": {"consumer_seq": self._floor[0], "stream_seq": self._floor[1]},
            "num_ack_pending": len(self._pending),
            "num_redelivered": 0 if self.config["max_deliver"] == 1 else len(self._repeats),
            "num_waiting": len(self._requests),
            "num_pending": len(self._unseen),
        }

    def update(self, config: dict[str, Any]) -> None:
        """Take another declaration, complete and checked."""
        self.config, self._filters = config, filters(config)
        self._look_over()
        self._serve()

    def has_done(self, sequence: int) -> bool:
        """Say whether this consumer needs a message no more."""
        return not any(sequence in mine for mine in (self._unseen, self._pending, self._repeats))

    def stored(self, message: Stored) -> None:
        """Take note of a new message."""
        if self._is_mine(message):
            self._unseen[message.sequence] = None
            self._serve()

    def gone(self, sequence: int) -> None:
        """Take note that the stream has a message no more."""
        self._unseen.pop(sequence, None)
        self._settle(sequence)

    def wanted(self, data: bytes, reply: str) -> None:
        """Take a request for messages (``batch``, ``expires`` in nanoseconds, ``no_wait`` …)."""
        self._stream.expire()
        self._requests.add(data, reply, len(self._unseen) + len(self._again))
        self._serve()

    def acknowledged(self, sequence: int, number: int, data: bytes) -> bool:
        """Take what somebody says of a message that was given out, and say whether that is answered.

        ``+ACK``, ``-NAK`` (with a delay, if it says one), ``+WPI`` or ``+TERM``; ``number`` is the consumer's
        sequence of the attempt, which counts for ``-NAK`` only, and there hardly.
        """
        word, _, rest = data.partition(b" ")
        if word in (b"", b"+ACK", b"+OK", b"+TERM"):
            if sequence >= self._next:
                return False
            self._settle(sequence)
            self._stream.done_with(sequence)
        elif (pending := self._pending.get(sequence)) is not None:
            if word == b"-NAK" and self._floor[0] < number <= self._count + 1:
                self._give_back(sequence, pending, _delay(rest))
            elif word == b"+WPI":  # also of what is to come again, which it does nevertheless
                self._await(sequence, pending, self._patience(self._attempts(sequence)))
        self._serve()
        return True

    def close(self) -> None:
        """End it: tell those who wait, and end every timer."""
        self._requests.close()
        if self._timer is not None:
            self._timer.cancel()

    # --- giving out --------------------------------------------------------------------------------------

    def _serve(self) -> None:
        if not len(self._requests):
            return
        self._stream.expire()
        stored = None
        while len(self._requests) and (stored := self._take()) is not None:
            reply = self._requests.next()
            if reply is None:
                self._put_back(stored.sequence)
                break
            self._give(stored, reply)
        self._requests.look(at_end=stored is None and not self._is_full())

    def _take(self) -> Stored | None:
        """Return what comes next: first what comes again, then, unless it is full, what nobody has seen."""
        most = self.config["max_deliver"]
        while self._again:
            sequence, _ = self._again.popitem(last=False)
            attempts = self._attempts(sequence)
            # Only now, as with the real one: it is given up when somebody asks for more.
            if not 0 < most <= attempts:
                return self._stream.messages[sequence]
            self._give_up(sequence, attempts)
        if self._is_full():
            return None
        if not self._unseen:
            self._next = max(self._next, self._stream.last_sequence + 1)
            return None
        sequence, _ = self._unseen.popitem(last=False)
        return self._stream.messages[sequence]

    def _put_back(self, sequence: int) -> None:
        waits = self._again if sequence in self._pending else self._unseen
        waits[sequence] = None
        waits.move_to_end(sequence, last=False)

    def _give(self, stored: Stored, reply: str) -> None:
        sequence = stored.sequence
        self._next = max(self._next, sequence + 1)
        self._last_given = max(self._last_given, sequence)
        self._count += 1
        pending = self._pending.get(sequence)
        if pending is None:
            pending = self._pending[sequence] = _Pending(self._count)
        else:
            self._repeats[sequence] = self._repeats.get(sequence, 0) + 1
        delivered = self._attempts(sequence)
        self._await(sequence, pending, self._patience(delivered))
        place = f"{self._stream.name}.{self._name}"
        numbers = f"{delivered}.{sequence}.{self._count}.{stored.time_ns}.{len(self._unseen)}"
        self._router.route(
            reply, stored.data, f"$JS.ACK.{place}.{numbers}", stored.headers, shown=stored.subject
        )

    def _is_full(self) -> bool:
        most: int = self.config["max_ack_pending"]
        return 0 < most <= len(self._pending)

    def _is_mine(self, stored: Stored) -> bool:
        return stored.sequence >= self._next and matches_any(self._filters, stored.subject)

    def _look_over(self) -> None:
        """Find what nobody has seen, of all that the stream has."""
        mine = (one.sequence for one in self._stream.messages.values() if self._is_mine(one))
        self._unseen = OrderedDict.fromkeys(mine)

    def _first(self) -> int:
        last = self._stream.last_sequence
        match self.config["deliver_policy"]:
            case "new":
                return last + 1
            case "by_start_sequence":
                return int(self.config["opt_start_seq"])
            case "last":
                return max(1, last)
        return next(iter(self._stream.messages), last + 1)

    def _place(self) -> dict[str, str]:
        return {"Nats-Last-Consumer": str(self._count), "Nats-Last-Stream": str(self._next - 1)}

    # --- waiting for acknowledgements --------------------------------------------------------------------

    def _attempts(self, sequence: int) -> int:
        return self._repeats.get(sequence, 0) + 1

    def _patience(self, attempt: int) -> float:
        """How long an attempt may take, in seconds."""
        backoff = self.config.get("backoff")
        wait = backoff[min(attempt, len(backoff)) - 1] if backoff else self.config["ack_wait"]
        return float(wait) / _NANOSECONDS

    def _give_back(self, sequence: int, pending: _Pending, delay: float | None) -> None:
        if delay is None:
            pending.due = None
            self._again[sequence] = None
            return
        self._again.pop(sequence, None)
        self._await(sequence, pending, delay)

    def _await(self, sequence: int, pending: _Pending, seconds: float) -> None:
        pending.due = asyncio.get_running_loop().time() + seconds
        heappush(self._dues, (pending.due, sequence))
        if self._timer is None or self._timer.when() > pending.due:
            self._arm()

    def _arm(self) -> None:
        while self._dues and not self._is_due(*self._dues[0]):
            heappop(self._dues)
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(self._dues[0][0], self._time_is_up) if self._dues else None

    def _is_due(self, due: float, sequence: int) -> bool:
        """Say whether a message still comes again at that time."""
        pending = self._pending.get(sequence)
        return pending is not None and pending.due == due

    def _time_is_up(self) -> None:
        until = asyncio.get_running_loop().time() + _TOGETHER
        late = []
        while self._dues and self._dues[0][0] <= until:
            due, sequence = heappop(self._dues)
            if self._is_due(due, sequence):
                self._pending[sequence].due = None
                late.append(sequence)
        self._again.update(dict.fromkeys(sorted(late)))
        self._timer = None
        self._arm()
        self._serve()

    def _give_up(self, sequence: int, attempts: int) -> None:
        del self._pending[sequence]
        self._repeats[sequence] = attempts  # so that it stays
        subject = f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{self._stream.name}.{self._name}"
        advisory = {
            "type": "io.nats.jetstream.advisory.v1.max_deliver",
            "stream": self._stream.name,
            "consumer": self._name,
            "stream_seq": sequence,
            "deliveries": attempts,
        }
        self._router.route(subject, json.dumps(advisory).encode())

    def _settle(self, sequence: int) -> None:
        """Expect nothing more of a message."""
        pending = self._pending.pop(sequence, None)
        self._repeats.pop(sequence, None)
        self._again.pop(sequence, None)
        if pending is not None:
            self._move_floor(sequence, pending)

    def _move_floor(self, sequence: int, pending: _Pending) -> None:
        """Note up to where everything is acknowledged."""
        if not self._pending:
            self._floor = (self._count, self._next - 1)
        elif pending.number == self._floor[0] + 1:
            oldest, first = next((key, one.number) for key, one in self._pending.items())
            self._floor = (first - 1, oldest - 1) if oldest > sequence else (pending.number, sequence)


def _delay(rest: bytes) -> float | None:
    """Read how long to wait, in seconds; none when it does not say, or not so that it is understood."""
    try:
        return float(json.loads(rest)["delay"]) / _NANOSECONDS
    except (ValueError, TypeError, KeyError):
        return None
