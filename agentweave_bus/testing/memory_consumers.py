"""Pull consumers in memory: what is given out, when it comes again, and when it is given up.

A message that was given out stays pending until it is acknowledged. It comes again when its time is up
(``ack_wait``, or the entry of ``backoff`` for that attempt), at once or after a delay when it is given back,
and its time starts anew with each sign of progress. After ``max_deliver`` attempts it comes no more, and an
advisory says so. Times run by the event loop's clock, so that a virtual one drives them.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

from agentweave_bus.testing.memory_messages import Route, Stored
from agentweave_bus.testing.memory_subjects import matches

__all__ = ["Consumer", "Source"]

_NANOSECONDS: Final = 1_000_000_000
_ACK_WAIT_NS: Final = 30 * _NANOSECONDS
_MAX_PENDING: Final = 1000
_NO_MESSAGES: Final = {"Status": "404", "Description": "No Messages"}


class Source(Protocol):
    """The stream that a consumer reads."""

    messages: dict[int, Stored]
    last_sequence: int

    @property
    def name(self) -> str:
        """The stream's name."""

    def expire(self) -> None:
        """Drop what is older than the stream keeps."""

    def done_with(self, sequence: int) -> None:
        """Note that a consumer needs a message no more."""


@dataclass(slots=True, eq=False)
class _Request:
    """Somebody who waits for messages: how many more, and where to."""

    reply: str
    left: int
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _Pending:
    """A message that was given out and is not acknowledged."""

    delivered: int
    timer: asyncio.TimerHandle | None = None

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Consumer:
    """One durable pull consumer of ``stream``, with explicit acknowledgements."""

    def __init__(self, stream: Source, name: str, config: dict[str, Any], route: Route) -> None:
        self.config = config
        self._stream = stream
        self._name = name
        self._route = route
        self._next = self._first()
        self._pending: dict[int, _Pending] = {}
        self._again: deque[int] = deque()
        self._attempts: dict[int, int] = {}
        self._requests: deque[_Request] = deque()
        self._count = 0
        self._last_given = 0

    def _first(self) -> int:
        match self.config.get("deliver_policy", "all"):
            case "new":
                return self._stream.last_sequence + 1
            case "by_start_sequence":
                return int(self.config["opt_start_seq"])
            case "last":
                return max(1, self._stream.last_sequence)
        return 1

    def info(self) -> dict[str, Any]:
        """Describe the consumer as the API does."""
        return {
            "stream_name": self._stream.name,
            "name": self._name,
            "config": self.config,
            "delivered": {"consumer_seq": self._count, "stream_seq": self._last_given},
            "num_ack_pending": len(self._pending),
            "num_redelivered": sum(1 for number in self._attempts.values() if number > 1),
            "num_waiting": len(self._requests),
            "num_pending": len(list(self._unseen())),
        }

    def has_done(self, sequence: int) -> bool:
        """Say whether this consumer needs a message no more."""
        stored = self._stream.messages.get(sequence)
        if stored is None or not self._filtered(stored):
            return True
        return sequence < self._next and sequence not in self._pending and sequence not in self._again

    def stored(self) -> None:
        """Look for work: the stream has a new message."""
        self._serve()

    def wanted(self, body: dict[str, Any], reply: str) -> None:
        """Take a request for messages (``batch``, ``expires`` in nanoseconds, ``no_wait``)."""
        request = _Request(reply, max(1, int(body.get("batch", 1))))
        self._requests.append(request)
        self._serve()
        if request not in self._requests:
            return
        expires = int(body.get("expires", 0))
        if body.get("no_wait") and not expires:
            self._requests.remove(request)
            self._route(reply, b"", headers=dict(_NO_MESSAGES))
        elif expires:
            loop = asyncio.get_running_loop()
            request.timer = loop.call_later(expires / _NANOSECONDS, self._expired, request)

    def acknowledged(self, sequence: int, data: bytes) -> None:
        """Take ``+ACK``, ``-NAK`` (with a delay, if it says one), ``+WPI`` or ``+TERM`` of a message.

        As with the real one, the acknowledgement of an earlier attempt counts for the one that is out.
        """
        pending = self._pending.get(sequence)
        if pending is None:
            return
        word, _, rest = data.partition(b" ")
        if word in (b"", b"+ACK", b"+TERM"):
            self._done(sequence)
        elif word == b"-NAK":
            delay = json.loads(rest).get("delay", 0) if rest.startswith(b"{") else 0
            self._wait(sequence, pending, delay / _NANOSECONDS)
        elif word == b"+WPI":
            self._wait(sequence, pending, self._patience(pending.delivered))
        self._serve()

    def close(self) -> None:
        """End every timer."""
        for pending in self._pending.values():
            pending.stop()
        for request in self._requests:
            if request.timer is not None:
                request.timer.cancel()

    # --- giving out --------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while self._requests and len(self._pending) < self.config.get("max_ack_pending", _MAX_PENDING):
            stored = self._take()
            if stored is None:
                return
            request = self._requests[0]
            request.left -= 1
            if request.left == 0:
                self._requests.popleft()
                if request.timer is not None:
                    request.timer.cancel()
            else:
                self._requests.rotate(-1)
            self._give(stored, request.reply)

    def _take(self) -> Stored | None:
        """Return what comes next: first what comes again, then what was never given out."""
        self._stream.expire()
        while self._again:
            stored = self._stream.messages.get(self._again.popleft())
            if stored is None:
                continue
            # Only now, as with the real one: it is given up when somebody asks for more.
            attempts, most = self._attempts[stored.sequence], self.config.get("max_deliver", -1)
            if not 0 < most <= attempts:
                return stored
            self._give_up(stored.sequence, attempts)
        found = next(self._unseen(), None)
        if found is not None:
            self._next = found.sequence + 1
        return found

    def _unseen(self) -> Iterator[Stored]:
        return (one for one in list(self._stream.messages.values()) if self._is_unseen(one))

    def _is_unseen(self, stored: Stored) -> bool:
        return stored.sequence >= self._next and self._filtered(stored)

    def _filtered(self, stored: Stored) -> bool:
        wanted = self.config.get("filter_subjects") or [self.config.get("filter_subject") or ">"]
        return any(matches(pattern, stored.subject) for pattern in wanted)

    def _give(self, stored: Stored, reply: str) -> None:
        delivered = self._attempts.get(stored.sequence, 0) + 1
        self._attempts[stored.sequence] = delivered
        self._count += 1
        self._last_given = max(self._last_given, stored.sequence)
        waiting = len(list(self._unseen()))
        place = f"{self._stream.name}.{self._name}"
        numbers = f"{delivered}.{stored.sequence}.{self._count}.{stored.time_ns}.{waiting}"
        pending = self._pending[stored.sequence] = _Pending(delivered)
        self._wait(stored.sequence, pending, self._patience(delivered))
        self._route(reply, stored.data, f"$JS.ACK.{place}.{numbers}", stored.headers, shown=stored.subject)

    # --- waiting for acknowledgements --------------------------------------------------------------------

    def _patience(self, delivered: int) -> float:
        """How long an attempt may take, in seconds."""
        backoff = self.config.get("backoff")
        if backoff:
            return float(backoff[min(delivered, len(backoff)) - 1]) / _NANOSECONDS
        return float(self.config.get("ack_wait") or _ACK_WAIT_NS) / _NANOSECONDS

    def _wait(self, sequence: int, pending: _Pending, seconds: float) -> None:
        pending.stop()
        if seconds <= 0:
            self._comes_again(sequence)
            return
        loop = asyncio.get_running_loop()
        pending.timer = loop.call_later(seconds, self._time_is_up, sequence)

    def _time_is_up(self, sequence: int) -> None:
        self._comes_again(sequence)
        self._serve()

    def _comes_again(self, sequence: int) -> None:
        self._pending.pop(sequence).stop()
        self._again.append(sequence)

    def _give_up(self, sequence: int, attempts: int) -> None:
        subject = f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{self._stream.name}.{self._name}"
        advisory = {
            "type": "io.nats.jetstream.advisory.v1.max_deliver",
            "stream": self._stream.name,
            "consumer": self._name,
            "stream_seq": sequence,
            "deliveries": attempts,
        }
        self._route(subject, json.dumps(advisory).encode())

    def _done(self, sequence: int) -> None:
        self._pending.pop(sequence).stop()
        self._attempts.pop(sequence, None)
        self._stream.done_with(sequence)

    def _expired(self, request: _Request) -> None:
        self._requests.remove(request)
        headers = {"Status": "408", "Description": "Request Timeout"}
        headers |= {"Nats-Pending-Messages": str(request.left), "Nats-Pending-Bytes": "0"}
        self._route(request.reply, b"", headers=headers)
