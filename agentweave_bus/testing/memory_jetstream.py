"""JetStream in memory: the API on which streams and consumers are made, asked for, and read.

There are creating, updating, describing and deleting of streams and pull consumers; publishing; reading one
message. What a declaration may hold but is not kept here (mirrors, sources, subject transforms, push
consumers) is refused rather than ignored, and so are verbs of the API that are not there.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any, Final

from agentweave_bus.testing.memory_configs import check_consumer_update, check_queue_consumer
from agentweave_bus.testing.memory_consumers import Consumer
from agentweave_bus.testing.memory_messages import (
    ApiError,
    Router,
    Stored,
    header_block,
    json_object,
    rfc3339,
)
from agentweave_bus.testing.memory_streams import Stream
from agentweave_bus.testing.memory_subjects import overlap

__all__ = ["JetStream"]

_API: Final = "$JS.API."
_ACK: Final = "$JS.ACK."
_ACK_TOKENS: Final = 9
_MOST_NAMES: Final = 1024
_DIRECT: Final = "DIRECT.GET."
_NEXT: Final = "CONSUMER.MSG.NEXT."
_DENIED: Final = {
    "DELETE": ("deny_delete", 10057, "message delete not permitted"),
    "PURGE": ("deny_purge", 10110, "stream purge not permitted"),
}


class JetStream:
    """Every stream of one broker, and the API in front of them."""

    def __init__(self, router: Router, time_ns: Callable[[], int]) -> None:
        self.streams: dict[str, Stream] = {}
        self._router = router
        self._time_ns = time_ns

    def received(self, subject: str, data: bytes, reply: str, headers: dict[str, str] | None) -> bool:
        """Look at a message that was published; return whether it was for JetStream."""
        if subject.startswith(_API):
            return self._asked(subject[len(_API) :], data, reply)
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
            self._answer(reply, answer)
        return True

    def add_stream(self, config: dict[str, Any], *, created_ns: int | None = None) -> Stream:
        """Make a stream; ``created_ns`` (since the epoch) lets it have been there for a while.

        Raises:
            ApiError: its declaration is refused, or holds what is not kept here.

        """
        created = self._time_ns() if created_ns is None else created_ns
        made = Stream(config, created, self._time_ns)
        self._check_subjects(made)
        self.streams[made.name] = made
        return made

    def add_consumer(self, stream: str, name: str, config: dict[str, Any], action: str = "") -> Consumer:
        """Make a consumer, or change the one that is there.

        ``action`` "create": an error when there is another one; "update": when there is none.

        Raises:
            ApiError: its declaration is refused, or holds what is not kept here; there is no such stream.

        """
        of = self._stream(stream)
        there = of.consumers.get(name)
        made = Consumer(of, name, config, self._router, self._time_ns())
        if there is None and action == "update":
            raise ApiError(400, 10149, "consumer does not exist")
        if there is not None and action == "create" and there.config != made.config:
            raise ApiError(400, 10148, "consumer already exists")
        if there is not None:
            check_consumer_update(there.config, made.config)
        if of.config["retention"] == "workqueue":
            others = [one.config for key, one in of.consumers.items() if key != name]
            check_queue_consumer(made.config, others)
        if made.config["ack_policy"] != "explicit":
            raise ApiError(501, 1, "the in-memory broker has explicit acknowledgements only")
        if there is None:
            return of.consumers.setdefault(name, made)
        if there.config != made.config:
            there.update(made.config)
        return there

    def close(self) -> None:
        """End every timer."""
        for stream in self.streams.values():
            stream.close()

    # --- the API -----------------------------------------------------------------------------------------

    def _asked(self, verb: str, data: bytes, reply: str) -> bool:
        if verb.startswith(_DIRECT):
            return self._direct_get(verb[len(_DIRECT) :], data, reply)
        if verb.startswith(_NEXT):
            stream, _, name = verb[len(_NEXT) :].partition(".")
            consumer = self._consumer_or_none(stream, name)
            if consumer is not None and reply:
                consumer.wanted(data, reply)
            return consumer is not None
        try:
            answer = self._done(verb, json_object(data))
        except ApiError as error:
            answer = {"error": error.body}
        if reply:
            self._answer(reply, answer)
        return True

    def _done(self, verb: str, body: dict[str, Any]) -> dict[str, Any]:
        family, _, rest = verb.partition(".")
        act, _, name = rest.partition(".")
        if family == "STREAM":
            return self._done_with_stream(act, name, body)
        if family == "CONSUMER":
            return self._done_with_consumer(act, name, body)
        raise _not_here(verb)

    def _done_with_stream(self, act: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        match act:
            case "INFO":
                return self._stream(name).info()
            case "CREATE":
                return self._create_stream(name, body).info() | {"did_create": True}
            case "UPDATE":
                stream = self._stream(name)
                stream.update(body)
                return stream.info()
            case "DELETE":
                self._stream(name).close()
                del self.streams[name]
                return {"success": True}
            case "PURGE":
                raise self._denied(name, "PURGE")
            case "NAMES":
                return self._names(body)
            case "MSG":
                verb, _, name = name.partition(".")
                return self._done_with_message(verb, self._stream(name), body)
        raise _not_here(f"STREAM.{act}")

    def _done_with_message(self, verb: str, stream: Stream, body: dict[str, Any]) -> dict[str, Any]:
        if verb == "GET":
            return _message(stream, body)
        if verb == "DELETE":
            stream.delete(int(body.get("seq", 0)))
            return {"success": True}
        raise self._denied(stream.name, verb)

    def _names(self, body: dict[str, Any]) -> dict[str, Any]:
        wanted, start = body.get("subject"), int(body.get("offset", 0))
        names = sorted(
            name
            for name, stream in self.streams.items()
            if wanted is None or any(overlap(wanted, mine) for mine in stream.config["subjects"])
        )
        shown = names[start : start + _MOST_NAMES]
        return {"total": len(names), "offset": start, "limit": _MOST_NAMES, "streams": shown or None}

    def _create_stream(self, name: str, config: dict[str, Any]) -> Stream:
        if config.get("name") != name:
            raise ApiError(400, 10056, "stream name in subject does not match request")
        there = self.streams.get(name)
        if there is None:
            return self.add_stream(config)
        if there.config != Stream(config, 0, self._time_ns).config:
            raise ApiError(400, 10058, "stream name already in use with a different configuration")
        return there

    def _done_with_consumer(self, act: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        if act == "DURABLE":
            act, _, name = name.partition(".")
        stream_name, _, consumer_name = name.partition(".")
        match act:
            case "CREATE":
                return self._create_consumer(stream_name, consumer_name, body).info()
            case "INFO":
                return self._consumer(stream_name, consumer_name).info()
            case "DELETE":
                self._consumer(stream_name, consumer_name).close()
                del self.streams[stream_name].consumers[consumer_name]
                return {"success": True}
        raise _not_here(f"CONSUMER.{act}")

    def _create_consumer(self, stream: str, subject: str, body: dict[str, Any]) -> Consumer:
        config = body.get("config") or {}
        if body.get("stream_name") != stream:
            raise ApiError(400, 10056, "stream name in subject does not match request")
        name, _, filtered = subject.partition(".")
        durable = config.get("durable_name") or config.get("name") or name
        if name and name != durable:
            words = "consumer name in subject does not match durable name in request"
            raise ApiError(400, 10017, words)
        if filtered and filtered != config.get("filter_subject"):
            words = "Consumer create request did not match filtered subject from create subject"
            raise ApiError(400, 10131, words)
        return self.add_consumer(stream, durable, config, body.get("action", ""))

    def _check_subjects(self, made: Stream) -> None:
        for other in self.streams.values():
            if other.name != made.name and any(
                overlap(one, theirs) for one in made.config["subjects"] for theirs in other.config["subjects"]
            ):
                raise ApiError(400, 10065, "subjects overlap with an existing stream")

    def _denied(self, name: str, verb: str) -> ApiError:
        if verb in _DENIED:
            key, err_code, words = _DENIED[verb]
            if self._stream(name).config[key]:
                return ApiError(500, err_code, words)
        return _not_here(f"STREAM.{verb}")

    def _stream(self, name: str) -> Stream:
        if name not in self.streams:
            raise ApiError(404, 10059, "stream not found")
        return self.streams[name]

    def _consumer(self, stream: str, name: str) -> Consumer:
        found = self._stream(stream).consumers.get(name)
        if found is None:
            raise ApiError(404, 10014, "consumer not found")
        return found

    def _consumer_or_none(self, stream: str, name: str) -> Consumer | None:
        found = self.streams.get(stream)
        return None if found is None else found.consumers.get(name)

    def _acknowledged(self, subject: str, data: bytes, reply: str) -> bool:
        """Take an acknowledgement: ``$JS.ACK.<stream>.<consumer>.<attempt>.<sequence>.<number>.…``."""
        parts = subject.split(".")
        consumer = self._consumer_or_none(parts[2], parts[3]) if len(parts) == _ACK_TOKENS else None
        if consumer is None:
            return False
        if consumer.acknowledged(int(parts[5]), int(parts[6]), data) and reply:
            self._router.route(reply, b"")
        return True

    def _answer(self, reply: str, answer: dict[str, Any]) -> None:
        self._router.route(reply, json.dumps(answer).encode())

    # --- reading one message -----------------------------------------------------------------------------

    def _direct_get(self, rest: str, data: bytes, reply: str) -> bool:
        name, _, subject = rest.partition(".")
        stream = self.streams.get(name)
        if stream is None or not stream.config["allow_direct"]:
            return False
        if reply:
            headers, body = _direct(stream, subject, data)
            self._router.route(reply, body, headers=headers)
        return True


def _direct(stream: Stream, subject: str, data: bytes) -> tuple[dict[str, str], bytes]:
    """Return what is answered to somebody who reads a message past the API."""
    try:
        body = json_object(data)
    except ApiError:
        return {"Status": "408", "Description": "Malformed Request"}, b""
    if subject and body:
        return {"Status": "408", "Description": "Bad Request"}, b""
    asked = {"last_by_subj": subject} if subject else body
    if not asked:
        return {"Status": "408", "Description": "Empty Request"}, b""
    found = _look_up(stream, asked)
    if found is None:
        return {"Status": "404", "Description": "Message Not Found"}, b""
    headers = {
        **(found.headers or {}),
        "Nats-Stream": stream.name,
        "Nats-Subject": found.subject,
        "Nats-Sequence": str(found.sequence),
        "Nats-Time-Stamp": rfc3339(found.time_ns),
    }
    return headers, found.data


def _message(stream: Stream, body: dict[str, Any]) -> dict[str, Any]:
    if not body:
        raise ApiError(400, 10003, "bad request")
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
        told["hdrs"] = base64.b64encode(header_block(found.headers)).decode()
    return {"message": told}


def _look_up(stream: Stream, body: dict[str, Any]) -> Stored | None:
    stream.expire()
    if "last_by_subj" in body:
        return stream.last_of(body["last_by_subj"])
    if "next_by_subj" in body:
        return stream.next_of(body["next_by_subj"], body.get("seq", 0))
    return stream.messages.get(body.get("seq", 0))


def _not_here(verb: str) -> ApiError:
    return ApiError(501, 1, f"the in-memory broker does not know {verb}")
