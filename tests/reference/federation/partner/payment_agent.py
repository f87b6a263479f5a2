# payment_agent.py
"""
Payment Agent - Processes payments for federated partners.

Trust Domain: partner.com
Called by: Various federated partners
"""

import asyncio
from decimal import Decimal
from typing import Dict, Any

from agentweave_bus import SecureAgent, capability, requires_federated_peer
from agentweave_bus.types import TaskResult, Message, DataPart


class PaymentAgent(SecureAgent):
    """
    Processes payments for federated partners.
    """

    @capability("process_payment")
    @requires_federated_peer(
        trust_domains=["acme-corp.io", "other-partner.io"]
    )
    async def process_payment(
        self,
        billing_id: str,
        customer_id: str,
        amount: str,
        currency: str,
        description: str,
        metadata: Dict[str, Any] = None
    ) -> TaskResult:
        """
        Process payment from federated partner.

        Security:
        - @requires_federated_peer ensures caller is from allowed domain
        - SDK verifies caller's SVID using federated trust bundle
        - Additional OPA policy checks applied
        """
        amount_decimal = Decimal(amount)
        metadata = metadata or {}

        # Get caller's trust domain
        caller_domain = self._extract_trust_domain(
            self.context.caller_spiffe_id
        )

        self.logger.info(
            "Processing federated payment request",
            extra={
                "caller_domain": caller_domain,
                "caller_id": self.context.caller_spiffe_id,
                "amount": amount,
                "currency": currency,
                "billing_id": billing_id
            }
        )

        # Verify caller is authorized for this customer
        if not await self._verify_partner_authorization(
            caller_domain, customer_id
        ):
            return TaskResult(
                status="failed",
                error=f"Partner {caller_domain} not authorized for customer {customer_id}"
            )

        # Process payment
        transaction = await self._process_payment_transaction(
            billing_id=billing_id,
            customer_id=customer_id,
            amount=amount_decimal,
            currency=currency,
            description=description,
            source_domain=caller_domain,
            source_agent=self.context.caller_spiffe_id
        )

        return TaskResult(
            status="completed",
            messages=[
                Message(
                    role="assistant",
                    parts=[
                        DataPart(data={
                            "transaction_id": transaction["id"],
                            "status": transaction["status"],
                            "amount": str(amount_decimal),
                            "currency": currency,
                            "processed_at": transaction["processed_at"]
                        })
                    ]
                )
            ],
            artifacts=[
                {
                    "type": "payment_transaction",
                    "data": transaction
                }
            ]
        )

    async def _verify_partner_authorization(
        self,
        partner_domain: str,
        customer_id: str
    ) -> bool:
        """
        Verify partner is authorized to process payments for customer.

        In production, check:
        - Partner registration database
        - Customer consent records
        - Partner rate limits
        """
        # Simplified for demo
        authorized_partners = ["acme-corp.io", "other-partner.io"]
        return partner_domain in authorized_partners

    async def _process_payment_transaction(
        self,
        billing_id: str,
        customer_id: str,
        amount: Decimal,
        currency: str,
        description: str,
        source_domain: str,
        source_agent: str
    ) -> Dict[str, Any]:
        """Process payment through payment gateway."""
        import uuid
        from datetime import datetime, timezone

        # In production, call payment gateway API
        transaction_id = str(uuid.uuid4())

        self.logger.info(
            "Payment processed",
            extra={
                "transaction_id": transaction_id,
                "source_domain": source_domain,
                "amount": str(amount)
            }
        )

        return {
            "id": transaction_id,
            "billing_id": billing_id,
            "customer_id": customer_id,
            "amount": str(amount),
            "currency": currency,
            "description": description,
            "status": "completed",
            "source_domain": source_domain,
            "source_agent": source_agent,
            "processed_at": datetime.now(timezone.utc).isoformat()
        }

    @staticmethod
    def _extract_trust_domain(spiffe_id: str) -> str:
        """Extract trust domain from SPIFFE ID."""
        # spiffe://trust-domain/path -> trust-domain
        parts = spiffe_id.split("/")
        return parts[2] if len(parts) > 2 else ""


async def main():
    agent = PaymentAgent.from_config("config/payment.yaml")
    await agent.run()


if __name__ == "__main__":
    asyncio.run(main())
