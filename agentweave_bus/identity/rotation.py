"""The identity that a process holds: current SVID, allowed bundles, and word of every change.

Everyone who signs, verifies or connects holds an :class:`IdentitySource`. It turns a provider into a
coherent :class:`IdentitySnapshot`, refuses an identity that is not the expected one, keeps the last good
snapshot while a provider is in trouble, and never hands out an expired SVID. The owner's task group runs
:meth:`IdentitySource.run`, which follows the provider. A provider's stream can end without a word, so
the same loop is a watchdog: issuers renew at half of an SVID's lifetime, so one that has used two thirds
of what was left when it came is overdue, and the provider is restarted until a newer one comes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import anyio

from agentweave_bus.exceptions import (
    BundleUnavailableError,
    FederationError,
    IdentityError,
    SvidUnavailableError,
)
from agentweave_bus.identity.bundle import EmptyBundleError
from agentweave_bus.spiffe_id import check_trust_domain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from agentweave_bus.identity.bundle import X509Bundle
    from agentweave_bus.identity.provider import IdentityProvider
    from agentweave_bus.identity.retired import RetiredAuthorities
    from agentweave_bus.identity.svid import X509Svid
    from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["IdentitySnapshot", "IdentitySource", "RotationHooks"]

_logger = logging.getLogger(__name__)

_OVERDUE: Final = 2 / 3
_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 10.0
_LONGEST_WAIT: Final = 300.0  # so that a clock set anew is noticed
_CLOSE_SECONDS: Final = 5.0


@dataclass(frozen=True)
class IdentitySnapshot:
    """One coherent view: the SVID, the bundles by trust domain, and a number that grows by each change."""

    svid: X509Svid
    bundles: Mapping[str, X509Bundle]
    generation: int


@dataclass(frozen=True, slots=True)
class RotationHooks:
    """What a source tells about its work; the owner counts it.

    ``rotated`` is called with each snapshot after the first whose SVID differs, ``failed`` with each
    error of the provider, ``restarted`` when the watchdog restarted an overdue provider.
    """

    rotated: Callable[[IdentitySnapshot], None] = field(default=lambda _snapshot: None)
    failed: Callable[[Exception], None] = field(default=lambda _error: None)
    restarted: Callable[[], None] = field(default=lambda: None)


class IdentitySource:
    """A provider's identity, checked and kept current. Implements ``TrustSource``.

    ``allowed_trust_domains`` are the other domains whose peers are accepted; the own domain always is.
    ``expected_id`` is the identity that this process must have, ``None`` to take what comes. ``clock``
    gives seconds since the epoch. ``history`` is told of every bundle, and so remembers who leaves one.
    """

    def __init__(
        self,
        provider: IdentityProvider,
        *,
        allowed_trust_domains: Iterable[str] = (),
        expected_id: SpiffeID | None = None,
        hooks: RotationHooks | None = None,
        clock: Callable[[], float] = time.time,
        history: RetiredAuthorities | None = None,
    ) -> None:
        self._provider = provider
        self._allowed = frozenset(check_trust_domain(domain) for domain in allowed_trust_domains)
        self._expected_id = expected_id
        self._hooks = hooks if hooks is not None else RotationHooks()
        self._clock = clock
        self._history = history
        self._snapshot: IdentitySnapshot | None = None
        self._received_at = 0.0  # both in seconds since the epoch, of the current SVID
        self._expires_at = 0.0
        self._last_error: Exception | None = None
        self._listeners: dict[object, Callable[[IdentitySnapshot], None]] = {}

    @property
    def current(self) -> IdentitySnapshot:
        """The snapshot in force.

        Raises:
            SvidUnavailableError: not started, or the SVID has expired.

        """
        snapshot = self._snapshot
        if snapshot is None:
            raise SvidUnavailableError("there is no identity yet: the identity source was not started")
        if self._clock() > self._expires_at:
            raise SvidUnavailableError(
                f"the SVID of {snapshot.svid.spiffe_id} expired at {snapshot.svid.expiry.isoformat()} "
                f"and no newer one has come{self._reason()}"
            )
        return snapshot

    @property
    def svid(self) -> X509Svid:
        """The current SVID. Raises SvidUnavailableError as :attr:`current` does."""
        return self.current.svid

    @property
    def spiffe_id(self) -> SpiffeID:
        """The identity of this process. Raises SvidUnavailableError before :meth:`start`."""
        if self._snapshot is None:
            raise SvidUnavailableError("there is no identity yet: the identity source was not started")
        return self._snapshot.svid.spiffe_id

    @property
    def now_ms(self) -> int:
        """The source's clock, in milliseconds since the epoch."""
        return int(self._clock() * 1000)

    @property
    def allowed_trust_domains(self) -> frozenset[str]:
        """The domains whose peers are accepted, the own one included."""
        return self._allowed | {self.spiffe_id.trust_domain}

    def bundle_for(self, trust_domain: str) -> X509Bundle:
        """Return the bundle of one domain (see ``TrustSource``).

        Raises:
            FederationError: the domain is not allowed, or its bundle is missing.
            SvidUnavailableError: not started.

        """
        snapshot = self._snapshot
        if snapshot is None:
            raise SvidUnavailableError("there is no identity yet: the identity source was not started")
        if trust_domain not in self._allowed and trust_domain != snapshot.svid.spiffe_id.trust_domain:
            raise FederationError(
                f"the trust domain {trust_domain} is not allowed here; "
                "identity.allowed_trust_domains lists those that are",
                trust_domain=trust_domain,
            )
        bundle = snapshot.bundles.get(trust_domain)
        if bundle is None:
            raise FederationError(
                f"the trust domain {trust_domain} is allowed, but its bundle is not known here; "
                "federate the domains at the identity provider",
                trust_domain=trust_domain,
            )
        return bundle

    def subscribe(self, listener: Callable[[IdentitySnapshot], None]) -> Callable[[], None]:
        """Have ``listener`` called on the event loop with each later snapshot; returns how to stop it."""
        key = object()
        self._listeners[key] = listener

        def unsubscribe() -> None:
            self._listeners.pop(key, None)

        return unsubscribe

    async def start(self, deadline: float = 30.0) -> None:
        """Open the provider and wait, at most ``deadline`` seconds, for the first identity.

        Raises:
            IdentityError: the identity is another than the expected one, or can't be had.
            SvidUnavailableError: none came in time; the message says what the provider said last.

        """
        try:
            with anyio.move_on_after(deadline):
                await self._provider.start()
                await self._first_identity()
            self._require_identity(deadline)
        except BaseException:
            await self.aclose()
            raise

    async def run(self) -> None:
        """Follow the provider until cancelled. Errors are logged and told to the hooks."""
        pause = _FIRST_PAUSE
        while True:
            try:
                await self._save_history()
                await self._follow_once()
                pause = _FIRST_PAUSE
            except Exception as error:  # noqa: BLE001 - a provider is foreign code, and the loop must go on
                self._last_error = error
                self._report(error)
                pause = min(pause * 2, self._longest_pause())
            await anyio.sleep(pause)

    async def refresh(self) -> bool:
        """Ask the provider now; return whether anything changed, in which case listeners were called.

        Raises:
            IdentityError: what the provider gave is refused; the snapshot stays as it was.

        """
        svid = await self._provider.get_svid()
        self._check(svid)
        bundles = await self._bundles(svid.spiffe_id.trust_domain)
        if self._history is not None:
            await self._history.load(bundles, now_ms=self.now_ms)
            self._history.note(bundles, now_ms=self.now_ms)
        return self._install(svid, bundles)

    async def aclose(self) -> None:
        """Close the provider, within a few seconds."""
        if self._history is not None:
            with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
                await self._history.end(now_ms=self.now_ms)
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True):
            await self._provider.aclose()

    async def _first_identity(self) -> None:
        pause = _FIRST_PAUSE
        while self._snapshot is None:
            try:
                await self.refresh()
            except (SvidUnavailableError, BundleUnavailableError) as error:
                self._last_error = error  # not registered yet, or the agent is starting: ask again
                await anyio.sleep(pause)
                pause = min(pause * 2, 1.0)

    def _require_identity(self, deadline: float) -> None:
        if self._snapshot is None:
            raise SvidUnavailableError(f"no identity within {deadline:g} s{self._reason()}")

    def _reason(self) -> str:
        """Return what the provider said last, if that was why there is no identity."""
        return f": {self._last_error}" if isinstance(self._last_error, IdentityError) else ""

    async def _follow_once(self) -> None:
        wait = self._seconds_until_overdue()
        if wait <= 0:
            await self._restart_provider()
            return
        with anyio.move_on_after(min(wait, _LONGEST_WAIT)):
            await self._provider.wait_for_update()
        await self.refresh()

    async def _restart_provider(self) -> None:
        self._hooks.restarted()
        await self._provider.restart()
        await self.refresh()
        if self._seconds_until_overdue() <= 0:
            raise SvidUnavailableError(
                f"the SVID of {self.spiffe_id} is overdue for renewal: it expires at {self._expiry_text()}, "
                "and the identity provider was restarted without getting a newer one"
            )

    def _seconds_until_overdue(self) -> float:
        if self._snapshot is None:
            return 0.0
        # From receipt, not from notBefore: issuers backdate, by more than a short SVID's whole life.
        left = self._expires_at - self._received_at
        return self._received_at + left * _OVERDUE - self._clock()

    def _longest_pause(self) -> float:
        """Seconds between attempts: the shorter the less life is left, but never a busy loop."""
        if self._snapshot is None:
            return _LONGEST_PAUSE
        left = self._expires_at - self._clock()
        return min(max(left / 20, _FIRST_PAUSE), _LONGEST_WAIT) if left > 0 else _LONGEST_PAUSE

    def _expiry_text(self) -> str:
        return self._snapshot.svid.expiry.isoformat() if self._snapshot is not None else "an unknown time"

    def _check(self, svid: X509Svid) -> None:
        if self._expected_id is not None and svid.spiffe_id != self._expected_id:
            raise IdentityError(
                f"the identity provider gave {svid.spiffe_id}, but this process must be {self._expected_id}; "
                "register the workload under that ID, or correct agent.name and agent.trust_domain"
            )
        now = self._clock()
        if now > svid.expiry.timestamp():
            raise SvidUnavailableError(
                f"the SVID of {svid.spiffe_id} expired at {svid.expiry.isoformat()}; "
                "is the identity provider renewing it?"
            )
        if now < svid.not_before.timestamp():
            raise SvidUnavailableError(
                f"the SVID of {svid.spiffe_id} is valid from {svid.not_before.isoformat()}; check the clock"
            )

    async def _bundles(self, own_domain: str) -> Mapping[str, X509Bundle]:
        bundles = {own_domain: await self._bundle(own_domain)}
        for domain in sorted(self._allowed - {own_domain}):
            try:
                bundles[domain] = await self._bundle(domain)
            except BundleUnavailableError:
                # The domain may be federated later; until then bundle_for refuses its peers by name.
                continue
        return MappingProxyType(bundles)

    async def _bundle(self, domain: str) -> X509Bundle:
        try:
            return await self._provider.get_trust_bundle(domain)
        except EmptyBundleError:
            if self._history is not None:
                self._history.drop_domain(domain)
            raise

    async def _save_history(self) -> None:
        if self._history is not None:
            await self._history.save(now_ms=self.now_ms)

    def _install(self, svid: X509Svid, bundles: Mapping[str, X509Bundle]) -> bool:
        previous, self._last_error = self._snapshot, None
        if previous is not None and previous.svid == svid and previous.bundles == bundles:
            return False
        generation = previous.generation + 1 if previous is not None else 1
        self._snapshot = IdentitySnapshot(svid, bundles, generation)
        rotated = previous is None or previous.svid != svid
        if rotated:
            self._received_at, self._expires_at = self._clock(), svid.expiry.timestamp()
        if previous is not None:
            self._announce(self._snapshot, rotated=rotated)
        return True

    def _announce(self, snapshot: IdentitySnapshot, *, rotated: bool) -> None:
        if rotated:
            self._hooks.rotated(snapshot)
        for listener in list(self._listeners.values()):
            try:
                listener(snapshot)
            except Exception as error:  # noqa: BLE001 - one listener's failure must not deafen the others
                self._report(error)

    def _report(self, error: Exception) -> None:
        known = isinstance(error, IdentityError)
        _logger.warning("identity: %s", error, exc_info=None if known else error)
        self._hooks.failed(error)
