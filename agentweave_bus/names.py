"""The names of capabilities and events: the one grammar that every part shares.

A capability is called by a single part, 1 to 64 of ``a-z``, ``0-9``, ``_`` and ``-`` with a letter or digit
first; an event's name is 1 to 8 such parts joined by dots. So a capability's name is one token of a subject,
and reads alike in a head, a grant, a configuration and a decorator.

Of events there are patterns, too: a name, a name with ``.*`` behind it for all that lies below it at any
depth (``order.*`` is for ``order.created`` and ``order.line.added``, not for ``order``), or ``*`` for all.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["CAPABILITY_NAME", "EVENT_NAME", "EVENT_PATTERN", "common_event", "covers_event"]

_PART: Final = r"[a-z0-9][a-z0-9_-]{0,63}"

CAPABILITY_NAME: Final = re.compile(_PART)
"""Use ``fullmatch``."""

EVENT_NAME: Final = re.compile(rf"{_PART}(?:\.{_PART}){{0,7}}")
"""Use ``fullmatch``. Every capability's name fits, too."""

EVENT_PATTERN: Final = re.compile(rf"\*|{_PART}(?:\.{_PART}){{0,7}}(?:\.\*)?")
"""Use ``fullmatch``."""


def covers_event(pattern: str, name: str) -> bool:
    """Say whether a pattern is for all that ``name``, which may be a pattern itself, stands for."""
    if pattern in ("*", name):
        return True
    return pattern.endswith(".*") and name.startswith(pattern[:-1]) and len(name) >= len(pattern)


def common_event(one: str, other: str) -> str | None:
    """Return the pattern for what two patterns have in common: the narrower one, or ``None``."""
    if covers_event(one, other):
        return other
    return one if covers_event(other, one) else None
