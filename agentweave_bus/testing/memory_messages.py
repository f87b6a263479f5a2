"""What the parts of the in-memory broker pass to each other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

__all__ = ["ApiError", "Router", "Stored", "header_block", "json_object", "rfc3339"]


class Router(Protocol):
    """Delivers messages to whoever listens."""

    def route(
        self,
        subject: str,
        data: bytes,
        reply: str = "",
        headers: dict[str, str] | None = None,
        *,
        shown: str | None = None,
    ) -> int:
        """Deliver to the listeners of ``subject``, to whom the message says ``shown``; return how many."""

    def is_heard(self, subject: str) -> bool:
        """Say whether anybody listens to ``subject``."""


class ApiError(Exception):
    """An error that JetStream answers with: HTTP's ``code``, its own ``err_code``, and the words."""

    def __init__(self, code: int, err_code: int, description: str) -> None:
        super().__init__(description)
        self.body = {"code": code, "err_code": err_code, "description": description}


@dataclass(frozen=True, slots=True)
class Stored:
    """One message of a stream; ``time_ns`` is when it was stored, since the epoch, ``size`` what it takes."""

    sequence: int
    subject: str
    data: bytes
    headers: dict[str, str] | None
    time_ns: int
    size: int


def rfc3339(time_ns: int) -> str:
    """Write a time, in nanoseconds since the epoch, as JetStream does: without zeros at the end."""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    fraction = f".{rest:09d}".rstrip("0").rstrip(".")
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}{fraction}Z"


def header_block(headers: dict[str, str] | None) -> bytes:
    """Write headers as they are sent and stored."""
    if not headers:
        return b""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"NATS/1.0\r\n{lines}\r\n".encode()


def json_object(data: bytes) -> dict[str, Any]:
    """Read the body of a request; none at all is an empty one.

    Raises:
        ApiError: it is no object.

    """
    try:
        body = json.loads(data or b"{}")
    except ValueError as error:
        raise ApiError(400, 10025, f"invalid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(400, 10025, "invalid JSON: not an object")
    return body
