"""What is trusted no more, although its certificates still verify.

A :class:`RevocationList` is asked on every use of a chain, cached or not, so that an entry takes effect
at the next message. Who fills it is no matter of this module; ``revocation_file.py`` does, from a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["RevocationList", "RevokedSet"]

_NONE: Final[Mapping[str, int]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class RevokedSet:
    """Everything revoked at one moment.

    ``spiffe_ids`` are identities, ``certificates`` SHA-256 of leaves (an envelope's ``x5t``), and
    ``authorities`` SHA-256 of authorities or intermediates. ``issued_before`` holds, by identity, the time
    (milliseconds since the epoch) from which on a certificate's validity must begin to be trusted.
    """

    spiffe_ids: frozenset[str] = frozenset()
    certificates: frozenset[bytes] = frozenset()
    authorities: frozenset[bytes] = frozenset()
    issued_before: Mapping[str, int] = field(default_factory=lambda: _NONE)


class RevocationList:
    """The revocations in force. Replaced as a whole, so that a reader never sees half a change."""

    def __init__(self, revoked: RevokedSet | None = None) -> None:
        self._revoked = revoked if revoked is not None else RevokedSet()

    @property
    def revoked(self) -> RevokedSet:
        """What is revoked now."""
        return self._revoked

    def replace(self, revoked: RevokedSet) -> None:
        """Put ``revoked`` in force from now on."""
        self._revoked = revoked

    def reason_against(
        self, spiffe_id: SpiffeID, x5t: bytes, issuers: Sequence[bytes], *, issued_ms: int = 0
    ) -> str | None:
        """Say why this identity, leaf or path is revoked; ``None`` when it is not.

        ``issued_ms`` is when the leaf's own validity begins; one that is not told counts as old.
        """
        revoked = self._revoked
        if spiffe_id in revoked.spiffe_ids:
            return "its identity is revoked"
        if issued_ms < revoked.issued_before.get(spiffe_id, issued_ms):
            return "certificates issued to it as early as this one are revoked"
        if x5t in revoked.certificates:
            return f"its certificate {x5t.hex()[:16]}… is revoked"
        for issuer in issuers:
            if issuer in revoked.authorities:
                return f"the authority {issuer.hex()[:16]}… that signed it is revoked"
        return None
