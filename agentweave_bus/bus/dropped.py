"""Answers that do not count, and how a person gets to know of them.

Whoever may send to a caller's inbox can make it drop as many as they like, so nothing is concluded from one,
and they fill no log: each callee and reason is named once a minute. The reason is one of a few, never a
sentence of who sent it.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Final

from agentweave_bus.exceptions import (
    AgentWeaveError,
    FederationError,
    IdentityError,
    SignatureRefusedError,
    TimeRefusedError,
)
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["DropLog", "WhyDropped", "dropped_words"]

_log = logging.getLogger(__name__)

_QUIET_S: Final = 60.0
_MAX_KEYS: Final = 256


class WhyDropped(Enum):
    """Why an answer does not count; the value is what is said of it."""

    TIME = "its time is too far from this clock's (compare the clocks; agentweave doctor does)"
    CHAIN = "its sender's certificates do not verify here (unknown, revoked, or not valid by this clock)"
    PROOF = "its signature does not verify"
    FORM = "it is no envelope"
    OTHER = "it is by somebody else, or answers something else"

    @classmethod
    def of(cls, error: AgentWeaveError) -> WhyDropped:
        """Return why an answer is dropped whose verification raised ``error``."""
        if isinstance(error, TimeRefusedError):
            return cls.TIME
        if isinstance(error, (IdentityError, FederationError)):
            return cls.CHAIN
        return cls.PROOF if isinstance(error, SignatureRefusedError) else cls.FORM


class DropLog:
    """Names each callee and reason in the log, once a minute. ``monotonic`` is in seconds."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._said: OrderedDict[tuple[SpiffeID, WhyDropped], float] = OrderedDict()

    def note(self, callee: SpiffeID, capability: str, why: WhyDropped) -> None:
        """Say, unless it was said lately, that an answer to a call of ``callee`` was dropped."""
        now, key = self._monotonic(), (callee, why)
        last = self._said.get(key)
        if last is not None and now - last < _QUIET_S:
            return
        self._said.pop(key, None)
        self._said[key] = now
        if len(self._said) > _MAX_KEYS:
            self._said.popitem(last=False)
        _log.warning(
            "an answer to a call of %s (%s) was dropped: %s; more of these are not named for a minute",
            callee,
            capability,
            why.value,
        )


def dropped_words(dropped: Mapping[WhyDropped, int]) -> str:
    """Return what is to be added to the words about a call without an answer; empty if nothing is."""
    if not dropped:
        return ""
    reasons = "; ".join(f"{count}: {why.value}" for why, count in dropped.items())
    return f". Answers came that do not count, and may be anybody's ({reasons})"
