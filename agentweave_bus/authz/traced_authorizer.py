"""The authorizer with a span around each decision: what was decided, by which policy, in what time."""

from __future__ import annotations

from agentweave_bus.authz.authorizer import Authorizer
from agentweave_bus.authz.decision import AuthzContext, AuthzDecision
from agentweave_bus.observability.spans import inner_span

__all__ = ["TracedAuthorizer"]


class TracedAuthorizer(Authorizer):
    """The authorizer of one identity, with spans; see :class:`Authorizer`.

    The reason of a decision is not in the span: a policy may quote in it what it was asked about.
    """

    async def authorize(self, context: AuthzContext) -> AuthzDecision:
        """Decide whether the action may happen."""
        with inner_span(
            "authorize",
            {
                "agentweave.authz.direction": context.direction,
                "agentweave.authz.kind": context.kind,
                "agentweave.authz.engine": type(self._engine).__name__,
            },
        ) as span:
            decision = await super().authorize(context)
            span.set_attribute("agentweave.authz.decision", "allow" if decision.allowed else "deny")
            span.set_attribute("agentweave.authz.standing", decision.standing)
            span.set_attribute("agentweave.authz.revision", decision.revision)
            span.set_attribute("agentweave.authz.decision_id", decision.decision_id)
            if not decision.answered:
                span.set_error("no_answer")
            return decision
