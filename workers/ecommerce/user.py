"""The user agent: accounts, sign-in, profiles, tiers. Asks nobody, and hears of confirmed orders."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from agentweave_bus import SecureAgent, capability, on_event
from workers.ecommerce.accounts import Accounts, Tier
from workers.ecommerce.asking import principal_name, request_key
from workers.ecommerce.goods import Money

__all__ = ["UserAgent"]

Email = Annotated[str, Field(pattern=r"^[^@\s]{1,64}@[^@\s.]+(\.[^@\s.]+)+$", max_length=254)]
Name = Annotated[str, Field(min_length=1, max_length=100)]
Password = Annotated[str, Field(min_length=8, max_length=200)]
ProfileText = Annotated[str, Field(max_length=500)]


class UserAgent(SecureAgent):
    """Manages customers' accounts."""

    def on_start(self) -> None:
        """Open the accounts."""
        self._accounts = Accounts()

    @capability("create_user")
    def create_user(
        self, email: Email, name: Name, tier: Tier = "free", password: Password | None = None
    ) -> dict[str, Any]:
        """Open an account. It begins as ``free``; a better tier that is asked for waits for the admin."""
        account = self._accounts.create(
            request_key(), email, name, tier=tier, password=password, owner=principal_name()
        )
        self.logger.info("user created", extra={"user_id": account["user_id"]})
        return account

    @capability("authenticate", safe=True)
    def authenticate(self, email: str, password: str) -> dict[str, Any]:
        """Check a password; fails in the same way whether the email or the password is wrong."""
        return self._accounts.authenticate(email, password)

    @capability("get_user", safe=True)
    def get_user(self, user_id: str) -> dict[str, Any]:
        """Show an account to other agents."""
        return self._accounts.find(user_id)

    @capability("get_profile", safe=True)
    def get_profile(self, user_id: str) -> dict[str, Any]:
        """Show an account with its profile to its owner."""
        return self._accounts.profile(user_id, principal_name())

    @capability("update_profile")
    def update_profile(
        self,
        user_id: str,
        address: ProfileText | None = None,
        phone: ProfileText | None = None,
    ) -> dict[str, Any]:
        """Change what is given of the profile, for its owner; an empty text removes it."""
        given = {"address": address, "phone": phone}
        changes = {field: text for field, text in given.items() if text is not None}
        return self._accounts.update_profile(user_id, principal_name(), changes)

    @capability("update_tier")
    def update_tier(self, user_id: str, new_tier: Tier) -> dict[str, Any]:
        """Change a customer's tier. The grants let only the admin agent ask for this."""
        account = self._accounts.set_tier(user_id, new_tier)
        self.logger.info("tier changed", extra={"user_id": user_id, "new_tier": new_tier})
        return account

    @on_event("order.confirmed")
    def note_order(self, order_id: str, user_id: str, total: Money) -> None:
        """Count a customer's orders, for the profile."""
        self._accounts.note_order(order_id, user_id)
        self.logger.info("order heard of", extra={"order_id": order_id, "total": str(total)})
