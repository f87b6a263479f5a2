"""Opening a parked task: whether it is genuine, meant to be where it is, and can be brought back.

What does not verify is nobody's, and becomes a dead letter as it came. What is genuine and can't be brought
back is recorded as ``rejected`` or ``failed``, so that its sender learns of it. Who may ask whom for what is
not looked at here: the agent's own policy is asked when the task is due, as of then.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from agentweave_bus.bus.streams import parked_stream_name
from agentweave_bus.bus.subjects import Family, park_subject, parse_subject
from agentweave_bus.envelope import (
    DEFAULT_LIMITS,
    EnvelopeVerifier,
    Kind,
    OpenedEnvelope,
    check_time_stored,
    verify_delegation,
)
from agentweave_bus.exceptions import (
    AgentWeaveError,
    ChainRefusedError,
    ConfigurationError,
    FederationError,
    MalformedEnvelopeError,
    TimeRefusedError,
)
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.record import TaskRef
from agentweave_bus.tasks.recurrence import Recurrence, recurrence
from agentweave_bus.types import TaskState

__all__ = ["MAX_DELAY_S", "NotBroughtBackError", "ParkedTask", "agent_of_parked", "open_parked"]

MAX_DELAY_S: Final = 31 * 86_400
"""How far ahead a task may be due: for so long the authorities that have left a bundle are remembered, by
which a sender is known whose certificates have expired meanwhile."""


class ParkedTask(NamedTuple):
    """A parked task that is genuine and can be brought back."""

    opened: OpenedEnvelope
    ref: TaskRef
    first_ms: int
    """When it is due first, in milliseconds since the epoch."""
    times: Recurrence | None

    def due_by(self, now_ms: int) -> int | None:
        """Return the time for which it is due now: of several that were missed, the latest."""
        if self.times is None:
            return self.first_ms if self.first_ms <= now_ms else None
        latest = self.times.latest(now_ms)
        return latest if latest is None or latest < self.opened.head.exp else None

    def due_after(self, now_ms: int) -> int | None:
        """Return when it is due next; ``None`` if never again."""
        following = self.first_ms if self.first_ms > now_ms else None
        if self.times is not None:
            following = self.times.next_after(now_ms)
        return following if following is not None and following < self.opened.head.exp else None


class NotBroughtBackError(AgentWeaveError):
    """A parked task that is not brought back.

    With ``opened`` it is genuine, and comes to ``state``; without it nobody knows whose it is. ``later`` says
    that it may verify another time.
    """

    def __init__(
        self,
        reason: str,
        *,
        opened: OpenedEnvelope | None = None,
        state: TaskState = TaskState.REJECTED,
        later: bool = False,
    ) -> None:
        super().__init__(reason)
        self.opened = opened
        self.state = state
        self.later = later


def agent_of_parked(subject: str, stream: str) -> SpiffeID:
    """Return for whom something on ``subject`` in ``stream`` is parked.

    Raises:
        MalformedEnvelopeError: the two don't belong together.

    """
    parsed = parse_subject(subject)
    if parsed.family is not Family.PARK or parked_stream_name(parsed.agent) != stream:
        raise MalformedEnvelopeError(f"{subject} is no place for a parked task of stream {stream}")
    return parsed.agent


def open_parked(
    verifier: EnvelopeVerifier,
    frame: bytes,
    *,
    agent: SpiffeID,
    subject: str,
    stored_at_ms: int,
    now_ms: int,
) -> ParkedTask:
    """Verify what is parked for ``agent``: sender, binding, delegation, time, and when it is due.

    Raises:
        NotBroughtBackError: it is not brought back; it says why, and what becomes of it.

    """
    try:
        opened = verifier.open_stored(frame, now_ms=now_ms, stored_at_ms=stored_at_ms)
        _check_binding(opened, agent, subject)
        _check_fresh(opened, stored_at_ms)
        verify_delegation(
            opened, verifier, now_ms=now_ms, stored_at_ms=stored_at_ms, judged_at_ms=opened.head.iat
        )
    except (ChainRefusedError, FederationError) as error:
        raise NotBroughtBackError(str(error), later=True) from error  # its authority may become known here
    except AgentWeaveError as error:
        raise NotBroughtBackError(str(error)) from error
    try:
        check_time_stored(opened, now_ms=now_ms, stored_at_ms=stored_at_ms, parked=True)
    except TimeRefusedError as error:
        raise NotBroughtBackError(str(error), opened=opened, state=TaskState.FAILED) from error
    return _scheduled(opened, agent)


def _scheduled(opened: OpenedEnvelope, agent: SpiffeID) -> ParkedTask:
    """Say when a genuine task is due, if it can be brought back then."""
    head = opened.head
    if head.nbf is None:
        raise NotBroughtBackError("a task is parked that does not say when it is due", opened=opened)
    if head.nbf - head.iat > MAX_DELAY_S * 1000:
        raise NotBroughtBackError(
            "it is due later than its sender's authorities are remembered", opened=opened
        )
    if len(opened.via) + 2 > DEFAULT_LIMITS.max_via_links:  # itself, and what its handler would ask for
        raise NotBroughtBackError("it was delegated too often to be parked", opened=opened)
    try:
        times = None if head.every is None else recurrence(head.every, head.nbf)
    except ConfigurationError as error:
        raise NotBroughtBackError(str(error), opened=opened) from error
    return ParkedTask(opened, TaskRef(agent, head.iss, head.cap, head.id), head.nbf, times)


def _check_binding(opened: OpenedEnvelope, agent: SpiffeID, subject: str) -> None:
    head = opened.head
    if head.kind is not Kind.TASK:
        raise MalformedEnvelopeError(f"a {head.kind} is not parked")
    if head.aud != agent or head.sub != subject or subject != park_subject(agent, head.cap):
        raise MalformedEnvelopeError(f"sealed for {head.sub} of {head.aud}, parked on {subject}")


def _check_fresh(opened: OpenedEnvelope, stored_at_ms: int) -> None:
    """Make sure that it was parked when it was signed: all that leads to it is judged as of that time.

    What somebody copied and parks again is so told from what its sender parked; nothing is recorded of it.
    """
    if abs(stored_at_ms - opened.head.iat) > DEFAULT_LIMITS.max_age_ms:
        raise MalformedEnvelopeError(f"parked {stored_at_ms - opened.head.iat} ms after it was signed")
