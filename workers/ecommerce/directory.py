"""Where the agents of the shop are: their SPIFFE IDs. There is nothing else to look up."""

from __future__ import annotations

from typing import Final

from agentweave_bus import SpiffeID

__all__ = ["ADMIN", "GATEWAY", "INVENTORY", "ORDER", "PAYMENT", "TRUST_DOMAIN", "USER"]

TRUST_DOMAIN: Final = "agentweave.io"

USER: Final = SpiffeID.of(TRUST_DOMAIN, "agent", "user")
ORDER: Final = SpiffeID.of(TRUST_DOMAIN, "agent", "order")
PAYMENT: Final = SpiffeID.of(TRUST_DOMAIN, "agent", "payment")
INVENTORY: Final = SpiffeID.of(TRUST_DOMAIN, "agent", "inventory")
GATEWAY: Final = SpiffeID.of(TRUST_DOMAIN, "agent", "gateway")
ADMIN: Final = SpiffeID.of(TRUST_DOMAIN, "agent", "admin")
