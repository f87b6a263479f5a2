"""Refusals: at which step of admission a request ended, why, and what of that its sender may learn."""

from __future__ import annotations

from enum import Enum

from agentweave_bus.authz import AuthzContext, AuthzDecision
from agentweave_bus.envelope import Kind, OpenedEnvelope
from agentweave_bus.exceptions import AgentWeaveError

__all__ = ["AdmissionRefusedError", "Step"]


class Step(Enum):
    """The step at which a request was refused: its number above and its name in records and answers."""

    SIZE = (1, "size")
    FRAME = (2, "frame")
    CHAIN = (3, "chain")
    PROOF = (4, "proof")
    HEAD = (5, "head")
    BINDING = (6, "binding")
    DELEGATION = (7, "delegation")
    TIME = (8, "time")
    REPLAY = (9, "replay")
    ROOM = (9, "room")
    PAYLOAD = (10, "payload")
    AUTHORIZATION = (11, "authorization")
    AUDIT = (12, "audit")

    def __init__(self, number: int, label: str) -> None:
        self.number = number
        self.label = label


class AdmissionRefusedError(AgentWeaveError):
    """A request was refused.

    ``step`` is where, ``reason`` the whole truth, for log and audit. ``told`` is what the requester may
    learn; ``None`` means that it gets no answer. ``request`` is the verified envelope, once there is
    one; ``facts`` and ``decision`` are there when a policy decided; ``retry_after`` is in seconds.
    ``audit_id`` names the record of the refusal.
    """

    def __init__(
        self,
        step: Step,
        reason: str,
        *,
        request: OpenedEnvelope | None = None,
        told: str | None = None,
        facts: AuthzContext | None = None,
        decision: AuthzDecision | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"refused at step {step.number} ({step.label}): {reason}")
        self.step = step
        self.reason = reason
        self.request = request
        self.told = told
        self.facts = facts
        self.decision = decision
        self.retry_after = retry_after
        self.audit_id = ""

    @property
    def waits(self) -> bool:
        """Whether it is a task that somebody may approve of, and so no end of it."""
        terms = None if self.decision is None else self.decision.approval
        return terms is not None and self.facts is not None and self.facts.kind == Kind.TASK
