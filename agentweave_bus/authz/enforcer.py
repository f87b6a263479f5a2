"""Asking in the words of the reference documents: ``check_inbound`` and ``check_outbound``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from agentweave_bus.authz.decision import AuthzContext

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentweave_bus.authz.authorizer import Authorizer
    from agentweave_bus.authz.decision import AuthzDecision, Direction

__all__ = ["OPAEnforcer", "PolicyEnforcer"]

_NAMED: Final = ("payload", "task_id", "kind", "transport", "via", "principal", "scope")


@runtime_checkable
class PolicyEnforcer(Protocol):
    """Whatever can say if a call may come in or go out."""

    async def check_inbound(
        self, caller_id: str, action: str, context: Mapping[str, Any] | None = None
    ) -> AuthzDecision:
        """Say whether ``caller_id`` may have ``action`` done here."""
        ...

    async def check_outbound(
        self, caller_id: str, callee_id: str, action: str, context: Mapping[str, Any] | None = None
    ) -> AuthzDecision:
        """Say whether ``caller_id`` may ask ``callee_id`` for ``action``."""
        ...


class OPAEnforcer:
    """Asks an :class:`Authorizer` on behalf of the agent ``spiffe_id``.

    ``context`` is what a policy finds below ``input.context``: ``payload``, ``task_id``, ``kind``,
    ``transport``, ``via``, ``principal`` and ``scope`` have their meaning (see :class:`AuthzContext`),
    other keys are further facts.
    """

    def __init__(self, authorizer: Authorizer, spiffe_id: str) -> None:
        self._authorizer = authorizer
        self._spiffe_id = spiffe_id

    async def check_inbound(
        self, caller_id: str, action: str, context: Mapping[str, Any] | None = None
    ) -> AuthzDecision:
        """Say whether ``caller_id`` may have ``action`` done by this agent."""
        return await self._ask(caller_id, self._spiffe_id, action, "inbound", context)

    async def check_outbound(
        self, caller_id: str, callee_id: str, action: str, context: Mapping[str, Any] | None = None
    ) -> AuthzDecision:
        """Say whether ``caller_id`` may ask ``callee_id`` for ``action``."""
        return await self._ask(caller_id, callee_id, action, "outbound", context)

    async def _ask(
        self,
        caller: str,
        callee: str,
        action: str,
        direction: Direction,
        context: Mapping[str, Any] | None,
    ) -> AuthzDecision:
        given = dict(context or {})
        named = {key: given.pop(key) for key in _NAMED if key in given}
        question = AuthzContext(
            caller=caller, callee=callee, action=action, direction=direction, extra=given, **named
        )
        return await self._authorizer.authorize(question)
