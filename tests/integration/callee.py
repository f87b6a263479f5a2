"""Playing the callee: honest answers by its own SVID, and others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nats.aio.msg import Msg

from agentweave_bus import (
    DataPart,
    Message,
    TaskResult,
)
from agentweave_bus.envelope import (
    Draft,
    Head,
    Kind,
    Sealed,
    Sealer,
    decode_frame,
    encode_payload,
    head_digest,
    new_id,
    parse_head,
)
from agentweave_bus.identity import (
    X509Svid,
)
from agentweave_bus.runtime.wiring import clock_ms


def request_of(message: Msg) -> tuple[Head, bytes]:
    """The head of a call as it went over the wire, and its digest."""
    frame = decode_frame(message.data)
    return parse_head(frame.head), head_digest(frame.head)


def reply_to(message: Msg, svid: X509Svid, value: Any = None, **changes: Any) -> Sealed:
    """Answer a call as who holds ``svid``; ``changes`` are to the head of the honest answer."""
    head, digest = request_of(message)
    now = clock_ms()
    values: dict[str, Any] = {
        "kind": Kind.REPLY,
        "id": new_id(now),
        "aud": head.iss,
        "cap": head.cap,
        "sub": message.reply,
        "iat": now,
        "exp": now + 30_000,
        "re": digest,
    } | changes
    body = result_of({"answer": "forged"}) if value is None else value
    return Sealer(lambda: svid).seal_now(Draft(**values), encode_payload(body))


def result_of(data: dict[str, Any]) -> dict[str, Any]:
    return TaskResult(
        status="completed", messages=[Message(role="assistant", parts=[DataPart(data)])]
    ).to_json()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
