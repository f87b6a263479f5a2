"""Replay: what an instance remembers of what it has admitted, and the key of what all replicas claim.

The filter is cheap and local; it holds for one process. Across replicas and restarts a call that has
side effects is claimed in a stream of the called agent, under :func:`claim_key`.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING

from agentweave_bus.envelope.envelope import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["ReplayFilter", "claim_key"]


class ReplayFilter:
    """Admits the digest of a head once, for as long as that head could pass the check of time.

    It is for the kinds that count *now*: those are taken from 2 s before their ``iat`` to 30 s after,
    so a digest that was admitted can't pass again later than 32 s after. Two generations of that
    length are kept, and forgetting one costs nothing. At most ``max_entries`` digests are held; forgetting
    early would let a replay in, so what does not fit is refused. It is refused to who takes most: of one
    sender as many are held as are free. So one sender gets half, two a third each, and however many they
    are, they leave as much to others as each of them has.
    """

    def __init__(self, *, max_entries: int = 800_000, limits: Limits = DEFAULT_LIMITS) -> None:
        self._max_entries = max_entries
        self._generation_ms = limits.max_age_ms + limits.clock_slack_ms
        self._turned_ms = 0
        self._young: set[bytes] = set()
        self._old: set[bytes] = set()
        self._young_of: dict[str, int] = {}  # how many of them a sender has
        self._old_of: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._young or digest in self._old

    def admit(self, digest: bytes, now_ms: int, sender: str, *, renew: bool = False) -> bool:
        """Remember ``digest``; say false when it was admitted before, or there is no room for it.

        Call it after :func:`.verification.check_time_now`, and never answer what it refuses. ``renew`` is
        for what ``sender`` may seal anew, and so is not of a head: refused, it is remembered from then on.
        """
        self._turn(now_ms)
        if digest in self:
            if renew and digest in self._old:
                self._renew(digest, sender)
            return False
        young = self._young_of.get(sender, 0)
        if young + self._old_of.get(sender, 0) >= self._max_entries - len(self):
            return False
        self._young.add(digest)
        self._young_of[sender] = young + 1
        return True

    def _renew(self, digest: bytes, sender: str) -> None:
        self._old.remove(digest)
        self._old_of[sender] -= 1
        self._young.add(digest)
        self._young_of[sender] = self._young_of.get(sender, 0) + 1

    def _turn(self, now_ms: int) -> None:
        # A clock that goes back turns nothing, so nothing is forgotten early.
        if now_ms - self._turned_ms <= self._generation_ms:
            return
        self._old, self._young = self._young, set()
        self._old_of, self._young_of = self._young_of, {}
        self._turned_ms = now_ms


def claim_key(iss: SpiffeID | str, aud: SpiffeID | str, cap: str, unique: str) -> str:
    """Return the key of a claim, state or idempotency record: 64 lower-case hexadecimal digits.

    It is SHA-256 over the four texts, each as its length (4 bytes, big-endian) and its UTF-8 bytes.
    ``unique`` is the head's ``id`` or ``idk``.
    """
    return sha256(_claim_prefix(iss, aud, cap) + _with_length(unique)).hexdigest()


@lru_cache(1024)  # who asks whom for what comes again with each request
def _claim_prefix(iss: str, aud: str, cap: str) -> bytes:
    return _with_length(iss) + _with_length(aud) + _with_length(cap)


def _with_length(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(4, "big") + data
