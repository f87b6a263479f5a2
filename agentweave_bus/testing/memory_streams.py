"""Streams in memory: what they keep, what they refuse, and what they let go of.

Every limit of a stream that this project declares is kept, in the order and the words of the real server.
Messages are found by sequence and by subject, and the oldest is at the front, so that nothing here takes
longer when there are many.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from agentweave_bus.testing.memory_configs import check_stream_update, stream_config
from agentweave_bus.testing.memory_consumers import Consumer
from agentweave_bus.testing.memory_messages import ApiError, Stored, header_block, rfc3339
from agentweave_bus.testing.memory_schedules import Schedules, due_of, fired_headers, is_scheduled
from agentweave_bus.testing.memory_subjects import has_wildcard, matches, matches_any

__all__ = ["Stream"]

_MSG_ID: Final = "Nats-Msg-Id"
_NO_TIME: Final = "0001-01-01T00:00:00Z"
_OVERHEAD: Final = {"memory": 16, "file": 30}
"""What the real server adds to a message's size, in bytes; a file has the length of headers as well."""


class Stream:
    """One stream with its messages, in order, and its consumers.

    Raises:
        ApiError: its declaration is refused.

    """

    def __init__(self, config: dict[str, Any], created_ns: int, time_ns: Callable[[], int]) -> None:
        self.config = stream_config(config)
        self.created_ns = created_ns
        self.messages: OrderedDict[int, Stored] = OrderedDict()
        self.last_sequence = 0
        self.consumers: dict[str, Consumer] = {}
        self._time_ns = time_ns
        self._ids: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._of_subject: dict[str, dict[int, None]] = {}
        self._bytes = 0
        self._last_time_ns = 0
        self._schedules = Schedules(time_ns, self._fire)

    @property
    def name(self) -> str:
        """The stream's name."""
        return str(self.config["name"])

    def takes(self, subject: str) -> bool:
        """Say whether messages on ``subject`` are stored here."""
        return matches_any(self.config["subjects"], subject)

    def update(self, config: dict[str, Any]) -> None:
        """Take another declaration. Raises ApiError."""
        new = stream_config(config)
        check_stream_update(self.config, new)
        self.config = new
        self.expire()

    def info(self) -> dict[str, Any]:
        """Describe the stream as the API does."""
        self.expire()
        first = next(iter(self.messages.values()), None)
        next_sequence = self.last_sequence + 1 if self.last_sequence else 0
        state = {
            "messages": len(self.messages),
            "bytes": self._bytes,
            "first_seq": first.sequence if first else next_sequence,
            "first_ts": rfc3339(first.time_ns) if first else _NO_TIME,
            "last_seq": self.last_sequence,
            "last_ts": rfc3339(self._last_time_ns) if self.last_sequence else _NO_TIME,
            "consumer_count": len(self.consumers),
        }
        if self._of_subject:
            state["num_subjects"] = len(self._of_subject)
        return {"config": self.config, "created": rfc3339(self.created_ns), "state": state}

    def store(self, subject: str, data: bytes, headers: dict[str, str] | None) -> dict[str, Any]:
        """Take a message and return the acknowledgement.

        Raises:
            ApiError: the stream refuses it.

        """
        self.expire()
        asked = headers or {}
        block = len(header_block(asked))
        self._check_size(len(data) + block)
        self._check_headers(asked)
        self._check_expected(subject, asked)
        due_ns = None
        if is_scheduled(asked):
            due_ns = due_of(subject, asked, self.config["subjects"])
            asked = headers = {**asked, "Nats-Rollup": "sub"}
            block = len(header_block(asked))
        identifier = asked.get(_MSG_ID)
        if identifier is not None and (known := self._known(identifier)) is not None:
            return {"stream": self.name, "seq": known, "duplicate": True}
        size = len(subject) + len(data) + block + self._overhead(block)
        self._check_limits(subject, size)
        kept = self._add(subject, data, headers, size)
        if identifier is not None:
            self._ids[identifier] = (kept.sequence, kept.time_ns)
        if due_ns is not None:
            self._drop_before(kept)
            self._schedules.add(subject, due_ns)
        for consumer in self.consumers.values():
            consumer.stored(kept)
        self._make_room()
        return {"stream": self.name, "seq": kept.sequence}

    def delete(self, sequence: int) -> None:
        """Delete a message. Raises ApiError."""
        self.expire()
        if self.config["deny_delete"]:
            raise ApiError(500, 10057, "message delete not permitted")
        if sequence not in self.messages:
            raise ApiError(500, 10057, "no message found")
        self._drop(sequence)

    def last_of(self, subject: str) -> Stored | None:
        """Return the newest message on ``subject``, which may be a pattern."""
        self.expire()
        if has_wildcard(subject):
            return next(
                (one for one in reversed(self.messages.values()) if matches(subject, one.subject)), None
            )
        sequences = self._of_subject.get(subject)
        return None if not sequences else self.messages[next(reversed(sequences))]

    def next_of(self, subject: str, start: int) -> Stored | None:
        """Return the first message on ``subject``, which may be a pattern, from a sequence on."""
        self.expire()
        newer = (one for one in self.messages.values() if one.sequence >= start)
        return next((one for one in newer if matches(subject, one.subject)), None)

    def expire(self) -> None:
        """Drop what is older than the stream keeps."""
        if not (limit := self.config["max_age"]):
            return
        oldest = self._time_ns() - limit
        while self.messages:
            first = next(iter(self.messages.values()))
            if first.time_ns > oldest:
                return
            self._drop(first.sequence)

    def done_with(self, sequence: int) -> None:
        """Note that a consumer needs a message no more: unless kept anyway, it goes when nobody does."""
        if self.config["retention"] == "limits" or sequence not in self.messages:
            return
        if all(one.has_done(sequence) for one in self.consumers.values()):
            self._drop(sequence)

    def close(self) -> None:
        """End every consumer and schedule."""
        self._schedules.close()
        for consumer in self.consumers.values():
            consumer.close()

    # --- what is kept ------------------------------------------------------------------------------------

    def _add(self, subject: str, data: bytes, headers: dict[str, str] | None, size: int) -> Stored:
        self.last_sequence += 1
        kept = Stored(self.last_sequence, subject, data, headers, self._time_ns(), size)
        self._keep(kept)
        return kept

    def _drop_before(self, kept: Stored) -> None:
        for sequence in [one for one in self._of_subject[kept.subject] if one != kept.sequence]:
            self._drop(sequence)

    def _fire(self, subject: str) -> None:
        """Store what is due on its target, in the place of its schedule."""
        self.expire()
        scheduled = self.last_of(subject)
        if scheduled is None or scheduled.headers is None or not is_scheduled(scheduled.headers):
            return
        target, headers = fired_headers(subject, scheduled.headers)
        self._drop(scheduled.sequence)
        block = len(header_block(headers))
        size = len(target) + len(scheduled.data) + block + self._overhead(block)
        fired = self._add(target, scheduled.data, headers, size)
        for consumer in self.consumers.values():
            consumer.stored(fired)
        self._make_room()

    def _keep(self, kept: Stored) -> None:
        self.messages[kept.sequence] = kept
        self._of_subject.setdefault(kept.subject, {})[kept.sequence] = None
        self._bytes += kept.size
        self._last_time_ns = kept.time_ns

    def _drop(self, sequence: int) -> None:
        gone = self.messages.pop(sequence)
        sequences = self._of_subject[gone.subject]
        del sequences[sequence]
        if not sequences:
            del self._of_subject[gone.subject]
        self._bytes -= gone.size
        for consumer in self.consumers.values():
            consumer.gone(sequence)

    def _overhead(self, block: int) -> int:
        return _OVERHEAD[self.config["storage"]] + (4 if block and self.config["storage"] == "file" else 0)

    def _known(self, identifier: str) -> int | None:
        limit = self._time_ns() - self.config["duplicate_window"]
        while self._ids and next(iter(self._ids.values()))[1] <= limit:
            self._ids.popitem(last=False)
        return self._ids[identifier][0] if identifier in self._ids else None

    # --- what is refused ---------------------------------------------------------------------------------

    def _check_headers(self, headers: dict[str, str]) -> None:
        if "Nats-Rollup" in headers and not self.config["allow_rollup_hdrs"]:
            raise ApiError(500, 10111, "rollup not permitted")
        if "Nats-TTL" in headers and not self.config["allow_msg_ttl"]:
            raise ApiError(400, 10166, "per-message TTL is disabled")
        if any(name.startswith("Nats-Schedule") for name in headers) and not self.config.get(
            "allow_msg_schedules"
        ):
            raise ApiError(400, 10188, "message schedules is disabled")
        wanted = headers.get("Nats-Expected-Stream")
        if wanted is not None and wanted != self.name:
            raise ApiError(400, 10060, "expected stream does not match")

    def _check_expected(self, subject: str, headers: dict[str, str]) -> None:
        last = headers.get("Nats-Expected-Last-Sequence")
        if last is not None and int(last) != self.last_sequence:
            raise ApiError(400, 10071, f"wrong last sequence: {self.last_sequence}")
        of_subject = headers.get("Nats-Expected-Last-Subject-Sequence")
        if of_subject is not None:
            filtered = headers.get("Nats-Expected-Last-Subject-Sequence-Subject", subject)
            found = self.last_of(filtered)
            if int(of_subject) != (sequence := found.sequence if found else 0):
                raise ApiError(400, 10071, f"wrong last sequence: {sequence}")

    def _check_size(self, size: int) -> None:
        """Compare what is stored of a message, its headers included, with the largest."""
        if 0 < self.config["max_msg_size"] < size:
            raise ApiError(400, 10054, "message size exceeds maximum allowed")

    def _check_limits(self, subject: str, size: int) -> None:
        config = self.config
        if config["discard"] != "new":
            return
        there = len(self._of_subject.get(subject, ()))
        if 0 < config["max_msgs_per_subject"] <= there:  # it takes the place of another one
            if config.get("discard_new_per_subject"):
                raise ApiError(503, 10077, "maximum messages per subject exceeded")
        elif 0 < config["max_msgs"] <= len(self.messages):
            raise ApiError(503, 10077, "maximum messages exceeded")
        if 0 < config["max_bytes"] < self._bytes + size:
            raise ApiError(503, 10077, "maximum bytes exceeded")

    def _make_room(self) -> None:
        """Let go of what the newest message is one too many for."""
        newest = next(reversed(self.messages.values()), None)
        per_subject = self.config["max_msgs_per_subject"]
        if newest is not None and per_subject > 0:
            sequences = self._of_subject[newest.subject]
            while len(sequences) > per_subject:
                self._drop(next(iter(sequences)))
        if self.config["discard"] == "new":
            return
        most, most_bytes = self.config["max_msgs"], self.config["max_bytes"]
        while 0 < most < len(self.messages) or (0 < most_bytes < self._bytes and self.messages):
            self._drop(next(iter(self.messages)))
