# billing_agent.py
"""
Billing Agent - Processes billing and initiates payments.

Trust Domain: acme-corp.io
Calls: partner.com/agent/payment (federated)
"""

import asyncio
from decimal import Decimal
from typing import Dict, Any

from agentweave_bus import SecureAgent, capability
from agentweave_bus.types import TaskResult, Message, DataPart
from agentweave_bus.exceptions import AgentCallError, FederationError


class BillingAgent(SecureAgent):
    """
    Processes billing and initiates payments via federated partner.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

        # Federated partner agent
        self.payment_agent_id = "spiffe://partner.com/agent/payment"

    @capability("process_billing")
    async def process_billing(
        self,
        customer_id: str,
        amount: Decimal,
        description: str
    ) -> TaskResult:
        """
        Process customer billing and initiate payment.

        This demonstrates:
        - Calling an agent in a different trust domain
        - SDK verifies federated trust bundle
        - Cross-domain authorization
        """
        self.logger.info(
            "Processing billing",
            extra={
                "customer_id": customer_id,
                "amount": str(amount),
                "payment_agent": self.payment_agent_id
            }
        )

        # Create billing record
        billing_record = await self._create_billing_record(
            customer_id, amount, description
        )

        try:
            # Call federated payment agent
            # SDK will:
            # 1. Get our SVID from SPIRE (trust domain A)
            # 2. Get trust bundle for partner.com (trust domain B)
            # 3. Establish mTLS using federated trust
            # 4. Verify payment agent's SVID against trust bundle B
            # 5. Check OPA policy (cross-domain call allowed?)
            payment_result = await self.call_agent(
                target=self.payment_agent_id,
                task_type="process_payment",
                payload={
                    "billing_id": billing_record["id"],
                    "customer_id": customer_id,
                    "amount": str(amount),
                    "currency": "USD",
                    "description": description,
                    "metadata": {
                        "source_domain": "acme-corp.io",
                        "billing_agent": str(self.spiffe_id)
                    }
                },
                timeout=60.0
            )

            if payment_result.status != "completed":
                await self._mark_billing_failed(billing_record["id"])
                raise AgentCallError(
                    f"Payment failed: {payment_result.error}"
                )

            # Extract payment data
            payment_data = payment_result.artifacts[0]["data"]

            # Update billing record
            await self._mark_billing_completed(
                billing_record["id"],
                payment_data["id"]
            )

            return TaskResult(
                status="completed",
                messages=[
                    Message(
                        role="assistant",
                        parts=[
                            DataPart(data={
                                "billing_id": billing_record["id"],
                                "payment_status": "completed",
                                "transaction_id": payment_data["id"],
                                "amount": str(amount),
                                "processed_by": self.payment_agent_id
                            })
                        ]
                    )
                ],
                artifacts=[
                    {
                        "type": "billing_result",
                        "data": {
                            "billing_record": billing_record,
                            "payment_data": payment_data
                        }
                    }
                ]
            )

        except FederationError as e:
            # Federation not configured or trust bundle unavailable
            self.logger.error(
                f"Federation error: {e}",
                extra={"target_domain": "partner.com"}
            )
            await self._mark_billing_failed(billing_record["id"])
            return TaskResult(
                status="failed",
                error=f"Cannot establish trust with partner.com: {e}"
            )

        except AgentCallError as e:
            self.logger.error(f"Payment call failed: {e}")
            await self._mark_billing_failed(billing_record["id"])
            return TaskResult(
                status="failed",
                error=f"Payment processing failed: {e}"
            )

    async def _create_billing_record(
        self,
        customer_id: str,
        amount: Decimal,
        description: str
    ) -> Dict[str, Any]:
        """Create billing record in database."""
        # In production, write to database
        import uuid
        return {
            "id": str(uuid.uuid4()),
            "customer_id": customer_id,
            "amount": str(amount),
            "description": description,
            "status": "pending",
            "created_at": self.context.request_time.isoformat()
        }

    async def _mark_billing_completed(
        self,
        billing_id: str,
        transaction_id: str
    ):
        """Mark billing as completed."""
        self.logger.info(
            "Billing completed",
            extra={
                "billing_id": billing_id,
                "transaction_id": transaction_id
            }
        )

    async def _mark_billing_failed(self, billing_id: str):
        """Mark billing as failed."""
        self.logger.warning(
            "Billing failed",
            extra={"billing_id": billing_id}
        )


async def main():
    agent = BillingAgent.from_config("config/billing.yaml")
    await agent.run()


if __name__ == "__main__":
    asyncio.run(main())
