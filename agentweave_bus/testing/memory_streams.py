"""JetStream in memory: streams, their limits, and the API on which they are asked for.

There are creating, updating and describing streams and pull consumers; publishing with expected sequences,
deduplication, and every limit of a stream that this project declares; reading one message. What a stream's
declaration may hold but is not kept here (mirrors, sources, subject transforms, several replicas) is refused
rather than ignored, and so are verbs of the API that are not there.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from agentweave_bus.testing.memory_consumers import Consumer
from agentweave_bus.testing.memory_messages import Route, Stored
from agentweave_bus.testing.memory_subjects import matches

__all__ = ["ApiError", "JetStream", "Stream", "rfc3339"]

_API: Final = "$JS.API."
_ACK: Final = "$JS.ACK."
_UNKNOWN: Final = frozenset({"mirror", "sources", "subject_transform", "republish"})
_MSG_ID: Final = "Nats-Msg-Id"
_MESSAGE_GONE: Final = {"Status": "404", "Description": "Message Not Found"}


class ApiError(Exception):
    """An error that JetStream answers with: HTTP's ``code``, its own ``err_code``, and the words."""

    def __init__(self, code: int, err_code: int, description: str) -> None:
        super().__init__(description)
        self.body = {"code": code, "err_code": err_code, "description": description}


class Stream:
    """One stream with its messages, in order, and its consumers."""

    def __init__(self, config: dict[str, Any], created_ns: int, time_ns: Callable[[], int]) -> None:
        self.config = config
        self.created_ns = created_ns
        self.messages: dict[int, Stored] = {}
        self.last_sequence = 0
        self.consumers: dict[str, Consumer] = {}
        self._time_ns = time_ns
        self._ids: dict[str, tuple[int, int]] = {}

    @property
    def name(self) -> str:
        """The stream's name."""
        return str(self.config["name"])

    def takes(self, subject: str) -> bool:
        """Say whether messages on ``subject`` are stored here."""
        return any(matches(pattern, subject) for pattern in self.config.get("subjects", ()))

    def info(self) -> dict[str, Any]:
        """Describe the stream as the API does."""
        self.expire()
        stored = list(self.messages.values())
        return {
            "config": self.config,
            "created": rfc3339(self.created_ns),
            "state": {
                "messages": len(stored),
                "bytes": sum(len(one.data) for one in stored),
                "first_seq": stored[0].sequence if stored else self.last_sequence + 1,
                "last_seq": self.last_sequence,
                "num_subjects": len({one.subject for one in stored}),
                "consumer_count": len(self.consumers),
            },
        }

    def store(self, subject: str, data: bytes, headers: dict[str, str] | None) -> dict[str, Any]:
        """Take a message and return the acknowledgement.

        Raises:
            ApiError: the stream refuses it.

        """
        self.expire()
        asked = headers or {}
        self._check_size(len(data) + len(_header_block(asked)))
        self._check_headers(asked)
        self._check_expected(subject, asked)
        identifier = asked.get(_MSG_ID)
        if identifier is not None and (known := self._known(identifier)) is not None:
            return {"stream": self.name, "seq": known, "duplicate": True}
        self._check_limits(subject)
        self.last_sequence += 1
        kept = Stored(self.last_sequence, subject, data, headers, self._time_ns())
        self.messages[kept.sequence] = kept
        if identifier is not None:
            self._ids[identifier] = (kept.sequence, kept.time_ns)
        for consumer in self.consumers.values():
            consumer.stored()
        return {"stream": self.name, "seq": kept.sequence}

    def last_of(self, subject: str) -> Stored | None:
        """Return the newest message on ``subject``."""
        self.expire()
        return next((one for one in reversed(self.messages.values()) if matches(subject, one.subject)), None)

    def expire(self) -> None:
        """Drop what is older than the stream keeps."""
        if not (limit := self.config.get("max_age", 0)):
            return
        oldest = self._time_ns() - limit
        for sequence in [one.sequence for one in self.messages.values() if one.time_ns <= oldest]:
            del self.messages[sequence]

    def done_with(self, sequence: int) -> None:
        """Note that a consumer acknowledged a message: work queues and interest let go of it."""
        retention = self.config.get("retention", "limits")
        everyone = all(one.has_done(sequence) for one in self.consumers.values())
        if retention == "workqueue" or (retention == "interest" and everyone):
            self.messages.pop(sequence, None)

    def _known(self, identifier: str) -> int | None:
        window = self.config.get("duplicate_window", 120_000_000_000)
        limit = self._time_ns() - window
        self._ids = {key: kept for key, kept in self._ids.items() if kept[1] > limit}
        return self._ids[identifier][0] if identifier in self._ids else None

    def _check_headers(self, headers: dict[str, str]) -> None:
        if "Nats-Rollup" in headers and not self.config.get("allow_rollup_hdrs"):
            raise ApiError(500, 10111, "rollup not permitted")
        if "Nats-TTL" in headers and not self.config.get("allow_msg_ttl"):
            raise ApiError(400, 10166, "per-message TTL is disabled")
        if any(name.startswith("Nats-Schedule") for name in headers):
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
        if 0 < self.config.get("max_msg_size", -1) < size:
            raise ApiError(400, 10054, "message size exceeds maximum allowed")

    def _check_limits(self, subject: str) -> None:
        config = self.config
        new = config.get("discard", "old") == "new"
        of_subject = [one.sequence for one in self.messages.values() if one.subject == subject]
        per_subject = config.get("max_msgs_per_subject", -1)
        if 0 < per_subject <= len(of_subject):
            if new and config.get("discard_new_per_subject"):
                raise ApiError(503, 10077, "maximum messages per subject exceeded")
            del self.messages[of_subject[0]]
        if 0 < config.get("max_msgs", -1) <= len(self.messages):
            if new:
                raise ApiError(503, 10077, "maximum messages exceeded")
            del self.messages[next(iter(self.messages))]


class JetStream:
    """Every stream of one broker, and the API in front of them."""

    def __init__(self, route: Route, time_ns: Callable[[], int]) -> None:
        self.streams: dict[str, Stream] = {}
        self._route = route
        self._time_ns = time_ns

    def received(self, subject: str, data: bytes, reply: str, headers: dict[str, str] | None) -> bool:
        """Look at a message that was published; return whether it was for JetStream."""
        if subject.startswith(_API):
            self._asked(subject[len(_API) :], data, reply)
            return True
        if subject.startswith(_ACK):
            return self._acknowledged(subject, data, reply)
        stream = next((one for one in self.streams.values() if one.takes(subject)), None)
        if stream is None:
            return False
        try:
            answer = stream.store(subject, data, headers)
        except ApiError as error:
            answer = {"error": error.body, "stream": stream.name, "seq": 0}
        if reply and not stream.config.get("no_ack"):
            self._route(reply, json.dumps(answer).encode())
        return True

    def add_stream(self, config: dict[str, Any], *, created_ns: int | None = None) -> Stream:
        """Make a stream; ``created_ns`` (since the epoch) lets it have been there for a while.

        Raises:
            ApiError: its declaration holds what is not kept here.

        """
        if unknown := sorted(_UNKNOWN & config.keys()):
            raise ApiError(501, 1, f"the in-memory broker has no {', '.join(unknown)}")
        created = self._time_ns() if created_ns is None else created_ns
        stream = self.streams[config["name"]] = Stream(dict(config), created, self._time_ns)
        return stream

    def close(self) -> None:
        """End every timer."""
        for stream in self.streams.values():
            for consumer in stream.consumers.values():
                consumer.close()

    # --- the API -----------------------------------------------------------------------------------------

    def _asked(self, verb: str, data: bytes, reply: str) -> None:
        direct = "DIRECT.GET."
        if verb.startswith(direct):
            self._direct_get(verb[len(direct) :], data, reply)
            return
        next_message = "CONSUMER.MSG.NEXT."
        if verb.startswith(next_message):
            stream, _, name = verb[len(next_message) :].partition(".")
            if (consumer := self._consumer_or_none(stream, name)) is not None:
                consumer.wanted(_json(data), reply)
            return
        try:
            answer = self._answer(verb, _json(data))
        except ApiError as error:
            answer = {"error": error.body}
        if reply:
            self._route(reply, json.dumps(answer).encode())

    def _answer(self, verb: str, body: dict[str, Any]) -> dict[str, Any]:
        family, _, rest = verb.partition(".")
        act, _, name = rest.partition(".")
        if family == "STREAM":
            return self._answer_stream(act, name, body)
        if family == "CONSUMER":
            return self._answer_consumer(act, name, body)
        raise _not_here(verb)

    def _answer_stream(self, act: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        match act:
            case "INFO":
                return self._stream(name).info()
            case "CREATE":
                there = self.streams.get(name)
                if there is not None and there.config != body:
                    raise ApiError(400, 10058, "stream name already in use with a different configuration")
                return (there or self.add_stream(body)).info() | {"did_create": there is None}
            case "UPDATE":
                stream = self._stream(name)
                stream.config = dict(body)
                return stream.info()
            case "DELETE":
                for consumer in self._stream(name).consumers.values():
                    consumer.close()
                del self.streams[name]
                return {"success": True}
            case "MSG":
                return self._message(self._stream(name.removeprefix("GET.")), body)
        raise _not_here(f"STREAM.{act}")

    def _answer_consumer(self, act: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        if act == "DURABLE":
            act, _, name = name.partition(".")
        stream_name, _, consumer_name = name.partition(".")
        stream = self._stream(stream_name)
        match act:
            case "CREATE":
                return self._make_consumer(stream, consumer_name.partition(".")[0], body["config"])
            case "INFO":
                return self._consumer(stream, consumer_name).info()
            case "DELETE":
                self._consumer(stream, consumer_name).close()
                del stream.consumers[consumer_name]
                return {"success": True}
        raise _not_here(f"CONSUMER.{act}")

    def _make_consumer(self, stream: Stream, name: str, config: dict[str, Any]) -> dict[str, Any]:
        if config.get("deliver_subject"):
            raise ApiError(501, 1, "the in-memory broker has pull consumers only")
        name = name or config.get("durable_name") or config["name"]
        there = stream.consumers.get(name)
        if there is not None:
            there.config = dict(config)
            return there.info()
        consumer = Consumer(stream, name, dict(config), self._route)
        stream.consumers[name] = consumer
        return consumer.info()

    def _stream(self, name: str) -> Stream:
        if name not in self.streams:
            raise ApiError(404, 10059, "stream not found")
        return self.streams[name]

    @staticmethod
    def _consumer(stream: Stream, name: str) -> Consumer:
        if name not in stream.consumers:
            raise ApiError(404, 10014, "consumer not found")
        return stream.consumers[name]

    def _consumer_or_none(self, stream: str, name: str) -> Consumer | None:
        found = self.streams.get(stream)
        return None if found is None else found.consumers.get(name)

    def _acknowledged(self, subject: str, data: bytes, reply: str) -> bool:
        """Take an acknowledgement: ``$JS.ACK.<stream>.<consumer>.<delivered>.<sequence>.…``."""
        _, _, stream, name, _delivered, sequence, *_ = subject.split(".")
        consumer = self._consumer_or_none(stream, name)
        if consumer is None:
            return False
        consumer.acknowledged(int(sequence), data)
        if reply:
            self._route(reply, b"")
        return True

    # --- reading one message -----------------------------------------------------------------------------

    @staticmethod
    def _message(stream: Stream, body: dict[str, Any]) -> dict[str, Any]:
        found = _look_up(stream, body)
        if found is None:
            raise ApiError(404, 10037, "no message found")
        told: dict[str, Any] = {
            "subject": found.subject,
            "seq": found.sequence,
            "data": base64.b64encode(found.data).decode(),
            "time": rfc3339(found.time_ns),
        }
        if found.headers:
            told["hdrs"] = base64.b64encode(_header_block(found.headers)).decode()
        return {"message": told}

    def _direct_get(self, rest: str, data: bytes, reply: str) -> None:
        name, _, subject = rest.partition(".")
        stream = self.streams.get(name)
        if stream is None or not stream.config.get("allow_direct") or not reply:
            return
        found = _look_up(stream, {"last_by_subj": subject} if subject else _json(data))
        if found is None:
            self._route(reply, b"", headers=dict(_MESSAGE_GONE))
            return
        headers = {
            **(found.headers or {}),
            "Nats-Stream": name,
            "Nats-Subject": found.subject,
            "Nats-Sequence": str(found.sequence),
            "Nats-Time-Stamp": rfc3339(found.time_ns),
        }
        self._route(reply, found.data, headers=headers)


def rfc3339(time_ns: int) -> str:
    """Write a time, in nanoseconds since the epoch, as JetStream does."""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def _look_up(stream: Stream, body: dict[str, Any]) -> Stored | None:
    stream.expire()
    if "last_by_subj" in body:
        return stream.last_of(body["last_by_subj"])
    if "next_by_subj" in body:
        start = body.get("seq", 0)
        return next(
            (
                one
                for one in stream.messages.values()
                if one.sequence >= start and matches(body["next_by_subj"], one.subject)
            ),
            None,
        )
    return stream.messages.get(body.get("seq", 0))


def _header_block(headers: dict[str, str]) -> bytes:
    if not headers:
        return b""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"NATS/1.0\r\n{lines}\r\n".encode()


def _json(data: bytes) -> dict[str, Any]:
    if not data:
        return {}
    body = json.loads(data)
    if not isinstance(body, dict):
        # JetStream takes a bare number as the size of a batch.
        return {"batch": int(body)}
    return body


def _not_here(verb: str) -> ApiError:
    return ApiError(501, 1, f"the in-memory broker does not know {verb}")
