"""The names of capabilities and events: the one grammar that every part shares.

A capability is called by a single part, 1 to 64 of ``a-z``, ``0-9``, ``_`` and ``-`` with a letter or digit
first; an event's name is 1 to 8 such parts joined by dots. So a capability's name is one token of a subject,
and reads alike in a head, a grant, a configuration and a decorator.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["CAPABILITY_NAME", "EVENT_NAME"]

_PART: Final = r"[a-z0-9][a-z0-9_-]{0,63}"

CAPABILITY_NAME: Final = re.compile(_PART)
"""Use ``fullmatch``."""

EVENT_NAME: Final = re.compile(rf"{_PART}(?:\.{_PART}){{0,7}}")
"""Use ``fullmatch``. Every capability's name fits, too."""
