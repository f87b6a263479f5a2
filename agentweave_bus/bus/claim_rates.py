"""How fast one sender may have claims made: 2,000 a second on each instance of an agent.

Each claim stays in a stream for minutes, so whoever could cause any number of them could fill it for all.
The 4,096 senders of the last calls are known; the others begin anew.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

__all__ = ["ClaimRates"]

_MAX_RATED_SENDERS: Final = 4096
_CLAIMS_PER_SECOND: Final = 2_000.0


class ClaimRates:
    """A token bucket a sender: how many claims it may cause in a second on this instance."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def take(self, sender: str, now_ms: int) -> bool:
        """Use one claim of ``sender``'s allowance, if there is one left."""
        tokens, since = self._buckets.pop(sender, (_CLAIMS_PER_SECOND, now_ms))
        tokens = min(_CLAIMS_PER_SECOND, tokens + max(0, now_ms - since) * _CLAIMS_PER_SECOND / 1000)
        allowed = tokens >= 1
        self._buckets[sender] = (tokens - 1 if allowed else tokens, max(now_ms, since))
        if len(self._buckets) > _MAX_RATED_SENDERS:
            self._buckets.popitem(last=False)
        return allowed
