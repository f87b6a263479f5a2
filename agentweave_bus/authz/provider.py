"""Authorization engines of your own: one method, asked before anything happens.

A provider replaces the policy engine and nothing else. Identity, signatures, limits and the audit log
stay as they are, and an exception, a timeout or an answer that is no :class:`AuthzDecision` denies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from agentweave_bus.authz.decision import AuthzDecision
from agentweave_bus.exceptions import ConfigurationError

if TYPE_CHECKING:
    from agentweave_bus.authz.decision import AuthzContext

__all__ = ["AllowAllProvider", "AuthorizationProvider"]


class AuthorizationProvider(ABC):
    """What a custom engine implements."""

    @abstractmethod
    async def authorize(self, context: AuthzContext) -> AuthzDecision:
        """Say whether the action may happen."""


class AllowAllProvider(AuthorizationProvider):
    """Allows everything. For development: it can't be made for production.

    Raises:
        ConfigurationError: ``environment`` is not ``development``.

    """

    def __init__(self, *, environment: str = "production") -> None:
        if environment != "development":
            raise ConfigurationError(
                f"Security violation: AllowAllProvider not allowed in {environment} environment.",
                key="authorization.provider",
                hint="Write grants in policies/grants.yaml, or set AGENTWEAVE_ENV to development.",
            )

    async def authorize(self, context: AuthzContext) -> AuthzDecision:
        """Allow ``context``, whatever it is."""
        return AuthzDecision(allowed=True, reason=f"AllowAllProvider allows {context.action}")
