"""Authorities that have left their trust bundle, and what they are still good for.

What lies in a stream for days was signed with certificates that may be signed by an authority which has been
rotated out since. :class:`RetiredAuthorities` remembers those that were in a bundle here, with the time at
which they left it. It answers one question: which authorities vouched for a trust domain at a time that has
passed, which a stream tells. Only :meth:`.chain.ChainVerifier.verify_retired` asks it; nothing that is
checked as of now, no call and no connection, ever does. What is remembered comes from this host's identity
provider and from its own files, never from a message.

An authority that is revoked is dropped, and so are all of a trust domain whose bundle has become empty.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
from cryptography.hazmat.primitives.serialization import Encoding

from agentweave_bus.identity.bundle import X509Bundle
from agentweave_bus.identity.chain import MAX_CERTIFICATE_BYTES
from agentweave_bus.identity.retired_file import AuthorityFolder, Kept, KnownAuthority, bounded
from agentweave_bus.identity.revocation import RevocationList
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["KEPT_DAYS", "RetiredAuthorities"]

_log = logging.getLogger(__name__)

KEPT_DAYS: Final = 32
"""For how long an authority is remembered: as long as records of tasks are."""

_KEPT_MS: Final = KEPT_DAYS * 86_400_000
_LONGEST_GAP_MS: Final = 600_000
"""Between two looks at the bundle, if it is to count as seen all the time in between: twice what an identity
source waits at most. After a longer one, as of a machine that slept, an authority left at the look before."""

_CLOCKS_MS: Final = 2_000
_SAVE_EVERY_MS: Final = 60_000
_DISK_SECONDS: Final = 5.0


class RetiredAuthorities:
    """What one identity remembers of the authorities that it trusted, in memory and in a directory.

    ``directory`` may be shared by identities and processes. ``revocations`` says which authorities are never
    remembered. ``on_alarm`` gets a sentence when what was remembered is not believed or can't be kept; that
    stops nobody. One instance belongs to one event loop; its times are in milliseconds since the epoch.
    """

    def __init__(
        self,
        directory: Path,
        identity: SpiffeID,
        *,
        revocations: RevocationList | None = None,
        on_alarm: Callable[[str], None] = lambda _sentence: None,
    ) -> None:
        self._folder = AuthorityFolder(directory, identity)
        self._revocations = revocations if revocations is not None else RevocationList()
        self._on_alarm = on_alarm
        self._known: dict[str, dict[bytes, KnownAuthority]] = {}
        self._noted_ms: dict[str, int] = {}
        self._loaded: set[str] = set()
        self._to_forget: set[str] = set()
        self._changed = False
        self._saved_ms: int | None = None
        self._disk = anyio.CapacityLimiter(1)
        self._hangs = False
        self._counting = threading.Lock()
        self._at_work = 0
        self._alarms: dict[str, str] = {}

    # --- answers

    def bundle_at(self, trust_domain: str, at_ms: int, *, now_ms: int) -> X509Bundle | None:
        """Return the authorities that were in the bundle at ``at_ms`` and left later (see ``PastTrust``)."""
        known = self._known.get(trust_domain, {})
        left = [one.certificate for key, one in known.items() if self._counts(key, one, at_ms, now_ms)]
        return X509Bundle(trust_domain, tuple(left)) if left else None

    def left_at(self, trust_domain: str, fingerprint: bytes, at_ms: int, *, now_ms: int) -> int | None:
        """Return when one of those left (see ``PastTrust``)."""
        one = self._known.get(trust_domain, {}).get(fingerprint)
        if one is None or not self._counts(fingerprint, one, at_ms, now_ms):
            return None
        return one.left_at_ms

    def _counts(self, key: bytes, one: KnownAuthority, at_ms: int, now_ms: int) -> bool:
        left = one.left_at_ms
        return left is not None and at_ms < left and self._may_be_kept(key, one, now_ms)

    def _may_be_kept(self, key: bytes, one: KnownAuthority, now_ms: int) -> bool:
        if key in self._revocations.revoked.authorities:
            return False
        left = one.left_at_ms
        # A time that is still to come was noted by a clock that was wrong, and so may any be before it.
        return left is None or now_ms - _KEPT_MS <= left <= now_ms + _CLOCKS_MS

    # --- what comes from the identity provider

    def note(self, bundles: Mapping[str, X509Bundle], *, now_ms: int) -> None:
        """Take note of the bundles that are in force from now on: of what is in them, and what is not."""
        for trust_domain, bundle in bundles.items():
            known = self._known.setdefault(trust_domain, {})
            before = dict(known)
            last_ms = self._noted_ms.get(trust_domain, now_ms)
            self._noted_ms[trust_domain] = now_ms
            left_ms = now_ms if now_ms - last_ms <= _LONGEST_GAP_MS else last_ms
            for key, one in before.items():
                if one.left_at_ms is None and key not in bundle.authority_fingerprints:
                    known[key] = replace(one, left_at_ms=left_ms)
                    self._changed = True
            self._add(known, bundle, now_ms)
        self._drop(now_ms)

    def _add(self, known: dict[bytes, KnownAuthority], bundle: X509Bundle, now_ms: int) -> None:
        for certificate in bundle.authorities:
            der = certificate.public_bytes(Encoding.DER)
            key = hashlib.sha256(der).digest()
            one = known.get(key)
            if (one is None or one.left_at_ms is not None) and len(der) <= MAX_CERTIFICATE_BYTES:
                known[key] = KnownAuthority(bundle.trust_domain, certificate, der, None, now_ms)
                self._changed = True

    def _drop(self, now_ms: int) -> None:
        for domain, known in self._known.items():
            kept = {key: one for key, one in known.items() if self._may_be_kept(key, one, now_ms)}
            self._known[domain] = bounded(kept)

    def drop_revoked(self) -> None:
        """Drop the authorities that are revoked by now."""
        revoked = self._revocations.revoked.authorities
        for known in self._known.values():
            for key in revoked & known.keys():
                del known[key]
                self._changed = True

    def drop_domain(self, trust_domain: str) -> None:
        """Drop all authorities of a trust domain: its bundle has become empty."""
        self._known.pop(trust_domain, None)
        self._noted_ms.pop(trust_domain, None)
        self._loaded.add(trust_domain)
        self._to_forget.add(trust_domain)
        self._changed = True

    # --- files; nothing here raises

    async def load(self, trust_domains: Iterable[str], *, now_ms: int) -> None:
        """Take up what was remembered of domains that are new here. To be called before they are noted."""
        for domain in set(trust_domains) - self._loaded:
            kept = await self._on_disk(domain, partial(self._folder.load, domain))
            if kept is None:
                continue
            self._loaded.add(domain)
            self._take(domain, kept, now_ms)

    async def save(self, *, now_ms: int) -> None:
        """Write down what has changed, and every minute or so what is there; learn what others wrote."""
        since_ms = None if self._saved_ms is None else now_ms - self._saved_ms
        if not self._changed and since_ms is not None and 0 <= since_ms < _SAVE_EVERY_MS:
            return
        self._changed, self._saved_ms = False, now_ms
        for domain in tuple(self._to_forget):
            if await self._on_disk(domain, partial(self._folder.forget, domain)) is None:
                self._changed = True  # and tried again
                return
            self._to_forget.discard(domain)
        for domain, seen_ms in tuple(self._noted_ms.items()):
            merge = partial(
                self._folder.merge,
                domain,
                dict(self._known.get(domain, {})),
                seen_ms=seen_ms,
                rule=partial(self._may_be_kept, now_ms=now_ms),
            )
            kept = await self._on_disk(domain, merge)
            if kept is None:
                self._changed = True
            elif domain in self._noted_ms:
                self._take(domain, kept, now_ms)

    async def end(self, *, now_ms: int) -> None:
        """Write down, for the next process, that what is in force was seen until now."""
        for domain, last_ms in self._noted_ms.items():
            if 0 <= now_ms - last_ms <= _LONGEST_GAP_MS:
                self._noted_ms[domain] = now_ms
        if self._noted_ms:
            self._saved_ms = None
            await self.save(now_ms=now_ms)

    def _take(self, trust_domain: str, kept: Kept, now_ms: int) -> None:
        """Add what others have seen to what this process knows; of what it knows itself it is sure."""
        known = self._known.setdefault(trust_domain, {})
        for key, one in kept.authorities.items():
            if key not in known and one.left_at_ms is not None and self._may_be_kept(key, one, now_ms):
                known[key] = one
        self._alarm(trust_domain, kept.alarm)

    async def _on_disk(self, trust_domain: str, work: Callable[[], Kept]) -> Kept | None:
        """Do ``work`` in a thread, for a few seconds at most: a disk that hangs must not stop an agent."""
        problem = "it does not answer"
        if not (self._hangs and self._at_work):
            with anyio.move_on_after(_DISK_SECONDS) as scope:
                try:
                    return await anyio.to_thread.run_sync(
                        partial(self._counted, work), abandon_on_cancel=True, limiter=self._disk
                    )
                except Exception as error:  # noqa: BLE001 - without a memory an agent goes on, whatever it is
                    problem = str(getattr(error, "strerror", None) or type(error).__name__)
            self._hangs = scope.cancelled_caught
        self._alarm(trust_domain, f"{self._folder.path} can't be used: {problem}")
        return None

    def _counted(self, work: Callable[[], Kept]) -> Kept:
        """Do ``work``, known to be at it. For a thread, which nobody can end and somebody may give up."""
        with self._counting:
            self._at_work += 1
        try:
            return work()
        finally:
            with self._counting:
                self._at_work -= 1

    def _alarm(self, trust_domain: str, sentence: str) -> None:
        if sentence and sentence != self._alarms.get(trust_domain):
            _log.error("authorities that leave the bundle of %s may be forgotten: %s", trust_domain, sentence)
            self._on_alarm(sentence)
        self._alarms[trust_domain] = sentence
