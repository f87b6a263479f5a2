# order_agent.py
"""
Order Agent - Manages customer orders.

Calls: User Agent, Payment Agent, Inventory Agent
"""

import asyncio
from typing import Dict, Any, List
from decimal import Decimal
from datetime import datetime, timezone

from agentweave_bus import SecureAgent, capability
from agentweave_bus.types import TaskResult, Message, DataPart
from agentweave_bus.exceptions import AgentCallError


class OrderAgent(SecureAgent):
    """Manages customer orders."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

        # Agent dependencies
        self.user_agent = "spiffe://agentweave.io/agent/user"
        self.payment_agent = "spiffe://agentweave.io/agent/payment"
        self.inventory_agent = "spiffe://agentweave.io/agent/inventory"

        self._orders: Dict[str, Dict] = {}

    @capability("create_order")
    async def create_order(
        self,
        user_id: str,
        items: List[Dict[str, Any]],
        payment_method: str
    ) -> TaskResult:
        """
        Create new order.

        Workflow:
        1. Verify user exists (call User Agent)
        2. Check inventory (call Inventory Agent)
        3. Process payment (call Payment Agent)
        4. Create order
        5. Update inventory

        Traditional microservices:
        - 5 HTTP calls with manual auth
        - Complex error handling
        - No built-in retries

        AgentWeave:
        - 5 agent calls with automatic mTLS
        - OPA policies enforce permissions
        - Built-in retries, circuit breakers
        - Distributed tracing included
        """
        import uuid
        order_id = str(uuid.uuid4())

        self.logger.info(
            "Creating order",
            extra={
                "order_id": order_id,
                "user_id": user_id,
                "items_count": len(items)
            }
        )

        try:
            # Step 1: Verify user
            user_result = await self.call_agent(
                target=self.user_agent,
                task_type="get_user",
                payload={"user_id": user_id}
            )

            if user_result.status != "completed":
                raise AgentCallError(f"User not found: {user_id}")

            user = user_result.artifacts[0]["data"]

            # Step 2: Check inventory availability
            inventory_result = await self.call_agent(
                target=self.inventory_agent,
                task_type="check_availability",
                payload={"items": items}
            )

            if inventory_result.status != "completed":
                raise AgentCallError("Items not available")

            # Step 3: Calculate total
            total = self._calculate_total(items)

            # Step 4: Process payment
            payment_result = await self.call_agent(
                target=self.payment_agent,
                task_type="process_payment",
                payload={
                    "user_id": user_id,
                    "amount": str(total),
                    "payment_method": payment_method,
                    "order_id": order_id
                }
            )

            if payment_result.status != "completed":
                raise AgentCallError("Payment failed")

            payment_data = payment_result.artifacts[0]["data"]

            # Step 5: Reserve inventory
            await self.call_agent(
                target=self.inventory_agent,
                task_type="reserve_items",
                payload={"order_id": order_id, "items": items}
            )

            # Step 6: Create order record
            order = {
                "order_id": order_id,
                "user_id": user_id,
                "items": items,
                "total": str(total),
                "payment_method": payment_method,
                "transaction_id": payment_data["transaction_id"],
                "status": "confirmed",
                "created_at": datetime.now(timezone.utc).isoformat()
            }

            self._orders[order_id] = order

            return TaskResult(
                status="completed",
                messages=[Message(
                    role="assistant",
                    parts=[DataPart(data=order)]
                )]
            )

        except AgentCallError as e:
            self.logger.error(f"Order creation failed: {e}")
            # In production, implement compensating transactions
            return TaskResult(
                status="failed",
                error=f"Failed to create order: {e}"
            )

    @capability("get_order")
    async def get_order(self, order_id: str) -> TaskResult:
        """Get order by ID."""
        order = self._orders.get(order_id)

        if not order:
            return TaskResult(
                status="failed",
                error=f"Order {order_id} not found"
            )

        return TaskResult(
            status="completed",
            messages=[Message(
                role="assistant",
                parts=[DataPart(data=order)]
            )]
        )

    def _calculate_total(self, items: List[Dict[str, Any]]) -> Decimal:
        """Calculate order total."""
        total = Decimal("0")
        for item in items:
            price = Decimal(str(item["price"]))
            quantity = item["quantity"]
            total += price * quantity
        return total


async def main():
    agent = OrderAgent.from_config("config/order.yaml")
    await agent.run()


if __name__ == "__main__":
    asyncio.run(main())
