import asyncio

from agentweave_bus import SecureAgent
from agentweave_bus.authz import AuthorizationProvider, AuthzContext, AuthzDecision
from agentweave_bus.config import load_config


class CustomAuthZ(AuthorizationProvider):
    allowed_callers = ["spiffe://example.com/client/friend"]

    async def authorize(self, context: AuthzContext) -> AuthzDecision:
        # Your custom logic
        if context.caller in self.allowed_callers:
            return AuthzDecision(allow=True, reason="custom_allowlist")
        return AuthzDecision(allow=False, reason="not_in_allowlist")


if __name__ == "__main__":
    config = load_config()

    # Use in config
    agent = SecureAgent(
        config=config,
        authz_provider=CustomAuthZ()
    )
    asyncio.run(agent.run())
