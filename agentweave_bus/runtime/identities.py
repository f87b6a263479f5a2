"""Who a process is, as its configuration says: where its SVID comes from, and whose it believes."""

from __future__ import annotations

from agentweave_bus.config import IdentityConfig
from agentweave_bus.identity import (
    IdentityProvider,
    IdentitySnapshot,
    IdentitySource,
    RetiredAuthorities,
    RevocationWatch,
    RotationHooks,
    SPIFFEIdentityProvider,
    StaticMTLSProvider,
)
from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.runtime.surroundings import Surroundings
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["configured_provider", "followed_revocations", "identity_source", "remembered_authorities"]


def identity_source(
    settings: IdentityConfig,
    me: SpiffeID,
    metrics: Metrics,
    surroundings: Surroundings,
    *,
    provider: IdentityProvider | None = None,
    history: RetiredAuthorities | None = None,
) -> IdentitySource:
    """Return the identity ``me``, not started, from ``provider`` or the one that is configured."""

    def rotated(snapshot: IdentitySnapshot) -> None:
        metrics.svid_rotations.inc()
        metrics.svid_expires(snapshot.svid.expiry.timestamp(), surroundings.wall_s)

    hooks = RotationHooks(rotated=rotated, failed=lambda _error: metrics.svid_rotation_errors.inc())
    return IdentitySource(
        configured_provider(settings, me) if provider is None else provider,
        allowed_trust_domains=settings.allowed_trust_domains,
        expected_id=me,
        hooks=hooks,
        clock=surroundings.wall_s,
        history=history,
    )


def configured_provider(settings: IdentityConfig, me: SpiffeID) -> IdentityProvider:
    """Return the identity provider that is configured, not started."""
    if settings.provider == "static":
        assert settings.static is not None  # the configuration was validated
        return StaticMTLSProvider(
            settings.static.cert_file, settings.static.key_file, settings.static.bundles
        )
    return SPIFFEIdentityProvider(settings.spiffe_endpoint, me)


def followed_revocations(settings: IdentityConfig, metrics: Metrics) -> RevocationWatch:
    """Read the file of revocations. Raises ConfigurationError."""
    return RevocationWatch(
        settings.revocations, on_alarm=lambda _sentence: metrics.revocation_load_errors.inc()
    )


def remembered_authorities(
    settings: IdentityConfig, me: SpiffeID, revocations: RevocationWatch
) -> RetiredAuthorities | None:
    """Return what remembers the authorities that leave a bundle, unless that is switched off."""
    if settings.authority_history is None:
        return None
    history = RetiredAuthorities(settings.authority_history, me, revocations=revocations.list)
    revocations.on_change(history.drop_revoked)
    return history
