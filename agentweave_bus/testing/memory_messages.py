"""What the parts of the in-memory broker pass to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Route", "Stored"]


class Route(Protocol):
    """Delivers a message to whoever listens; returns how many did."""

    def __call__(
        self,
        subject: str,
        data: bytes,
        reply: str = "",
        headers: dict[str, str] | None = None,
        *,
        shown: str | None = None,
    ) -> int:
        """Deliver to the listeners of ``subject``; to them the message says ``shown``."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One message of a stream; ``time_ns`` is when it was stored, since the epoch."""

    sequence: int
    subject: str
    data: bytes
    headers: dict[str, str] | None
    time_ns: int
