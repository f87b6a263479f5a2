"""The W3C Trace Context ``traceparent`` header as a value (version 00, section 3.2).

It comes from other agents, so the grammar is strict, and what does not match counts as absent: a
trace is never a reason to refuse a call.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Final

__all__ = ["TraceParent"]

_GRAMMAR: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class TraceParent:
    """A position in a trace: ``trace_id`` and ``span_id`` in lower-case hexadecimal."""

    trace_id: str
    span_id: str
    sampled: bool

    @classmethod
    def parse(cls, text: str | None) -> TraceParent | None:
        """Return the value of ``text``, or None where it is absent or malformed."""
        match = _GRAMMAR.fullmatch(text) if text is not None else None
        if match is None or set(match[1]) == {"0"} or set(match[2]) == {"0"}:
            return None
        return cls(match[1], match[2], bool(int(match[3], 16) & 1))

    @classmethod
    def new(cls) -> TraceParent:
        """Start a trace of its own that is not sampled; for correlation where tracing is off."""
        return cls(secrets.token_hex(16), secrets.token_hex(8), sampled=False)

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"
