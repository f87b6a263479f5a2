# gateway_agent.py
"""
Gateway Agent - Public-facing API gateway.

Traditional: Kong, NGINX, AWS API Gateway
AgentWeave: Secure agent with routing logic
"""

import asyncio
from typing import Dict, Any

from agentweave_bus import SecureAgent, capability
from agentweave_bus.types import TaskResult, Message, DataPart
from agentweave_bus.exceptions import AgentCallError


class GatewayAgent(SecureAgent):
    """
    API Gateway implemented as an agent.

    Benefits over traditional gateway:
    - No separate gateway configuration
    - Routing logic in Python (testable)
    - Same security model as other agents
    - Built-in observability
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

        # Service registry
        self.services = {
            "user": "spiffe://agentweave.io/agent/user",
            "order": "spiffe://agentweave.io/agent/order",
            "payment": "spiffe://agentweave.io/agent/payment",
            "inventory": "spiffe://agentweave.io/agent/inventory"
        }

    @capability("route")
    async def route(
        self,
        service: str,
        action: str,
        payload: Dict[str, Any]
    ) -> TaskResult:
        """
        Route request to appropriate service.

        Traditional API Gateway:
        - Complex YAML/JSON configuration
        - Limited routing logic
        - Manual auth integration

        AgentWeave Gateway:
        - Python routing logic
        - Automatic mTLS to services
        - Type-safe payloads
        """
        target = self.services.get(service)

        if not target:
            return TaskResult(
                status="failed",
                error=f"Service {service} not found"
            )

        self.logger.info(
            "Routing request",
            extra={
                "service": service,
                "action": action,
                "target": target
            }
        )

        try:
            result = await self.call_agent(
                target=target,
                task_type=action,
                payload=payload,
                timeout=30.0
            )
            return result

        except AgentCallError as e:
            self.logger.error(f"Routing failed: {e}")
            return TaskResult(
                status="failed",
                error=f"Service call failed: {e}"
            )

    @capability("health")
    async def health(self) -> TaskResult:
        """
        Health check all services.

        Returns status of all backend services.
        """
        results = {}

        for service_name, service_id in self.services.items():
            try:
                # Try to call health endpoint with short timeout
                result = await self.call_agent(
                    target=service_id,
                    task_type="health",
                    payload={},
                    timeout=5.0
                )
                results[service_name] = "healthy" if result.status == "completed" else "unhealthy"
            except Exception as e:
                results[service_name] = f"unhealthy: {e}"

        all_healthy = all(status == "healthy" for status in results.values())

        return TaskResult(
            status="completed" if all_healthy else "degraded",
            messages=[Message(
                role="assistant",
                parts=[DataPart(data={
                    "gateway": "healthy",
                    "services": results
                })]
            )]
        )


async def main():
    agent = GatewayAgent.from_config("config/gateway.yaml")
    await agent.run()


if __name__ == "__main__":
    asyncio.run(main())
