"""The payment agent: charges and refunds. Asks nobody, and writes down on whose behalf it was asked."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import Field

from agentweave_bus import SecureAgent, capability
from agentweave_bus.exceptions import TaskFailedError
from workers.ecommerce.asking import asked_by
from workers.ecommerce.goods import Money
from workers.ecommerce.payments import Payments

__all__ = ["PaymentAgent"]

DECLINED: Final = "expired_card"
"""The payment method with which this example's bank declines."""

Method = Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")]


class PaymentAgent(SecureAgent):
    """Manages payments. There is no bank behind this example: every method but ``expired_card`` pays."""

    def on_start(self) -> None:
        """Open the payments."""
        self._payments = Payments()

    @capability("process_payment")
    def process_payment(
        self, user_id: str, amount: Money, payment_method: Method, order_id: str
    ) -> dict[str, Any]:
        """Charge for an order, once, and say on whose behalf that was."""
        if payment_method == DECLINED:
            raise TaskFailedError("The bank declined: the card has expired")
        payment = self._payments.charge(order_id, user_id, amount, payment_method, asked_by())
        self.logger.info("charged", extra={"order_id": order_id, "amount": str(amount)})
        return payment

    @capability("refund")
    def refund(self, order_id: str) -> dict[str, Any]:
        """Give back what was charged for an order, once; it can't be charged for afterwards."""
        payment = self._payments.refund(order_id)
        self.logger.info("refunded", extra={"order_id": order_id, "status": payment["status"]})
        return payment

    @capability("get_payment", safe=True)
    def get_payment(self, order_id: str) -> dict[str, Any]:
        """Show the payment for an order."""
        return self._payments.find(order_id)
