# user_agent.py
"""
User Agent - Manages user accounts and authentication.

Traditional Equivalent: User Microservice
Port: 8080 (HTTP) → 8443 (HTTPS + mTLS)
"""

import asyncio
from typing import Dict, Any, Optional
from pydantic import BaseModel, EmailStr

from agentweave_bus import SecureAgent, capability
from agentweave_bus.types import TaskResult, Message, DataPart


class User(BaseModel):
    """User model."""
    user_id: str
    email: EmailStr
    name: str
    tier: str = "free"  # free, premium, enterprise


class UserAgent(SecureAgent):
    """Manages user accounts."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._users: Dict[str, User] = {}  # In production, use database

    @capability("create_user")
    async def create_user(
        self,
        email: str,
        name: str,
        tier: str = "free"
    ) -> TaskResult:
        """
        Create new user account.

        In traditional microservice:
        - POST /api/v1/users
        - Manual JWT validation
        - Application-level authorization

        With AgentWeave:
        - Caller identity verified by SDK (SPIFFE)
        - OPA policy checked automatically
        - No manual auth code needed
        """
        import uuid
        user_id = str(uuid.uuid4())

        user = User(
            user_id=user_id,
            email=email,
            name=name,
            tier=tier
        )

        self._users[user_id] = user

        self.logger.info(
            "User created",
            extra={
                "user_id": user_id,
                "caller": self.context.caller_spiffe_id
            }
        )

        return TaskResult(
            status="completed",
            messages=[Message(
                role="assistant",
                parts=[DataPart(data=user.model_dump())]
            )]
        )

    @capability("get_user")
    async def get_user(self, user_id: str) -> TaskResult:
        """
        Get user by ID.

        Traditional: GET /api/v1/users/{user_id}
        """
        user = self._users.get(user_id)

        if not user:
            return TaskResult(
                status="failed",
                error=f"User {user_id} not found"
            )

        return TaskResult(
            status="completed",
            messages=[Message(
                role="assistant",
                parts=[DataPart(data=user.model_dump())]
            )]
        )

    @capability("update_tier")
    async def update_tier(
        self,
        user_id: str,
        new_tier: str
    ) -> TaskResult:
        """
        Update user tier (admin only).

        Traditional: PATCH /api/v1/users/{user_id}/tier
        Required: Admin JWT token

        AgentWeave: OPA policy ensures only admin agents can call this
        """
        user = self._users.get(user_id)

        if not user:
            return TaskResult(
                status="failed",
                error=f"User {user_id} not found"
            )

        user.tier = new_tier
        self._users[user_id] = user

        self.logger.info(
            "User tier updated",
            extra={
                "user_id": user_id,
                "new_tier": new_tier,
                "caller": self.context.caller_spiffe_id
            }
        )

        return TaskResult(
            status="completed",
            messages=[Message(
                role="assistant",
                parts=[DataPart(data=user.model_dump())]
            )]
        )


async def main():
    agent = UserAgent.from_config("config/user.yaml")
    await agent.run()


if __name__ == "__main__":
    asyncio.run(main())
