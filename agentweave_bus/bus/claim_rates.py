"""How fast one sender may have claims made: 2,000 a second on each instance of an agent.

Each claim stays in a stream for minutes, so whoever could cause any number of them could fill it for all.
The 4,096 senders of the last calls are known; the others begin anew.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from agentweave_bus.bus.token_bucket import TokenBucket

__all__ = ["ClaimRates"]

_MAX_RATED_SENDERS: Final = 4096
_CLAIMS_PER_SECOND: Final = 2_000.0


class ClaimRates:
    """A token bucket a sender: how many claims it may cause in a second on this instance."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def take(self, sender: str, now_ms: int) -> bool:
        """Use one claim of ``sender``'s allowance, if there is one left."""
        bucket = self._buckets.pop(sender, None) or TokenBucket(_CLAIMS_PER_SECOND)
        self._buckets[sender] = bucket
        if len(self._buckets) > _MAX_RATED_SENDERS:
            self._buckets.popitem(last=False)
        return bucket.take(now_ms, size=_CLAIMS_PER_SECOND, per_second=_CLAIMS_PER_SECOND)
