"""What admission is given, what it must know of a capability, and what it lets through."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from agentweave_bus.authz import AuthzDecision
from agentweave_bus.envelope import Link, OpenedEnvelope, Requester, VerifiedLink
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["Admitted", "Arrival", "Capability", "OpenedTask", "StoredArrival", "ValidatedPayload"]


class Arrival(NamedTuple):
    """How a frame came: the subject it was delivered on and the reply subject that the broker names."""

    subject: str
    reply: str


class StoredArrival(NamedTuple):
    """How a frame came that lay in a stream: the subject it was stored on, and when (ms since the epoch)."""

    subject: str
    stored_at_ms: int


class ValidatedPayload(Protocol):
    """A payload that fits its capability. ``policy_payload`` is what the policy is asked about."""

    @property
    def policy_payload(self) -> Any:
        """The validated arguments in JSON form, defaults filled in, decimals as ``Decimal``."""


class Capability(Protocol):
    """What admission must know of a capability. ``agent.dispatch.BoundCapability`` is one."""

    @property
    def name(self) -> str:
        """The capability's name."""

    @property
    def safe(self) -> bool:
        """Whether running it twice does no harm, so that no claim is needed."""

    @property
    def content_type(self) -> str:
        """The content type of the payloads that it takes."""

    def validate(self, value: Any) -> ValidatedPayload:
        """Check a decoded payload. Raises :class:`PayloadError`."""

    def admits_peer(self, caller: SpiffeID) -> str | None:
        """Return why ``caller`` may not use it whatever the policy says, or ``None``."""


class Admitted(NamedTuple):
    """A request that has passed every step and may run now, or a task that is to be undone."""

    request: OpenedEnvelope
    capability: Capability
    payload: ValidatedPayload
    via: tuple[VerifiedLink, ...]
    links: tuple[Link, ...]
    """What a nested call must carry to prove that it serves this request; nothing where it may not."""
    decision: AuthzDecision
    audit_id: str
    """Names the record of the admission; empty where an earlier one stands for it, and for its outcome."""
    blob_bytes: int = 0
    """How large a payload is that came by reference; 0 if it came with the request."""


class OpenedTask(NamedTuple):
    """A stored task that is genuine, meant for this agent and in time: steps 1 to 8."""

    request: OpenedEnvelope
    capability: Capability
    via: tuple[VerifiedLink, ...]
    asks: Requester
    """Who asks, and the digest of the head that every record names; reissues are seen through."""
    stored_at_ms: int
