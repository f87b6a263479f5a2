"""Text of strangers, made safe to show: nothing in it can steer a terminal or write a line of its own.

Error texts of callees, reasons of refusals and records of peers' logs reach terminals and log files.
Escape sequences in them could retitle a window, fill the clipboard or repaint what stands above, and
bidirectional controls make a text read as another one.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["escape_json", "escape_line", "escape_text"]

# C0 and C1 controls, line and paragraph separators, bidirectional controls; and lone surrogates, which
# can't be written at all.
_UNSAFE: Final = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_IN_LINE: Final = re.compile(f"[{_UNSAFE}]")
_IN_TEXT: Final = re.compile(rf"(?!\n)[{_UNSAFE}]")


def escape_line(text: str) -> str:
    """Return ``text`` with everything that is not plain text escaped, line breaks too."""
    return _IN_LINE.sub(_escape, text)


def escape_text(text: str) -> str:
    """Return ``text`` of several lines; only line breaks keep their meaning."""
    return _IN_TEXT.sub(_escape, text)


def escape_json(text: str) -> str:
    """Return JSON that means the same; what is not plain text in its strings is escaped there."""
    return _IN_TEXT.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}"  # noqa: PLR2004 - what two digits hold
