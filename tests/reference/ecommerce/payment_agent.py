"""
Payment Agent - Process payments.

The reference names this agent and what it answers ("transaction_id"), and does not show it.
"""

import asyncio
import uuid
from decimal import Decimal

from agentweave_bus import SecureAgent, capability
from agentweave_bus.types import TaskResult, Message, DataPart


class PaymentAgent(SecureAgent):
    """Processes payments."""

    @capability("process_payment")
    async def process_payment(
        self,
        user_id: str,
        amount: Decimal,
        payment_method: str,
        order_id: str
    ) -> TaskResult:
        """Take a payment; say on whose behalf it was asked, as the verified chain tells it."""
        return TaskResult(
            status="completed",
            messages=[Message(
                role="assistant",
                parts=[DataPart(data={
                    "transaction_id": str(uuid.uuid4()),
                    "order_id": order_id,
                    "amount": str(amount),
                    "asked_by": [str(link.iss) for link in self.context.via]
                })]
            )]
        )


async def main():
    agent = PaymentAgent.from_config("config/payment.yaml")
    await agent.run()


if __name__ == "__main__":
    asyncio.run(main())
