"""The gateway agent: the one door for clients. It routes by a table and decides nothing about rights."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from agentweave_bus import AgentCallError, DataPart, Message, SecureAgent, SpiffeID, TaskResult, capability
from workers.ecommerce.directory import ADMIN, INVENTORY, ORDER, PAYMENT, USER

__all__ = ["GatewayAgent"]

SERVICES: Final[dict[str, SpiffeID]] = {
    "user": USER,
    "order": ORDER,
    "payment": PAYMENT,
    "inventory": INVENTORY,
}
HEALTH_SECONDS: Final = 3.0


class GatewayAgent(SecureAgent):
    """Routes clients' requests."""

    @capability("route")
    async def route(self, service: str, action: str, payload: dict[str, Any]) -> TaskResult:
        """Ask ``service`` for ``action``. What the gateway may ask for stands in the grants."""
        target = SERVICES.get(service)
        if target is None:
            return _failed(f"Service {service} not found; there are {', '.join(SERVICES)}")
        self.logger.info("routing", extra={"service": service})
        try:
            return await self.call_agent(target, action, payload, timeout=30.0)
        except AgentCallError as error:
            self.logger.warning("routing to %s failed: %s", service, error)
            return _failed(f"Service call failed: {error}")

    @capability("health", safe=True)
    async def health(self) -> TaskResult:
        """Say how every agent behind the gateway is."""
        behind = {**SERVICES, "admin": ADMIN}
        states = await asyncio.gather(*(self._health_of(agent) for agent in behind.values()))
        services = dict(zip(behind, states, strict=True))
        well = all(state == "healthy" for state in states)
        return TaskResult(
            status="completed" if well else "degraded",
            messages=[
                Message(role="assistant", parts=[DataPart(data={"gateway": "healthy", "services": services})])
            ],
        )

    async def _health_of(self, agent: SpiffeID) -> str:
        try:
            result = await self.call_agent(agent, "health", {}, timeout=HEALTH_SECONDS)
        except AgentCallError as error:
            return f"unhealthy: {error}"
        return "healthy" if result.status == "completed" else f"unhealthy: {result.error}"


def _failed(error: str) -> TaskResult:
    return TaskResult(status="failed", error=error)
