"""The steps of an order, and what undoes them.

Carrying out: the user exists, the goods are there at that price, the payment, the reservation. Undoing
asks for a refund and a release whatever was reached: both are harmless where there is nothing to
undo, and both bar a step that is still on its way. So it doesn't matter where an order broke off, or
whether an answer was lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from agentweave_bus import AgentCallError, TaskResult
from agentweave_bus.exceptions import TaskFailedError
from workers.ecommerce.directory import INVENTORY, PAYMENT, USER

__all__ = ["Ask", "Checkout"]

STEP_SECONDS: Final = 5.0

Ask = Callable[[str, str, Any, float], Awaitable[TaskResult]]
"""``SecureAgent.call_agent``: target, capability, payload, timeout in seconds."""


class Checkout:
    """Carries orders out and undoes them, by asking the other agents."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def carry_out(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Take all steps; return the priced ``items``, their ``total`` and the ``payment``.

        Raises:
            TaskFailedError: a step failed; the message says which and why.

        """
        order_id, user_id, items = order["order_id"], order["user_id"], order["items"]
        await self._step(USER, "get_user", {"user_id": user_id})
        priced = await self._step(INVENTORY, "check_availability", {"items": items})
        payment = await self._step(
            PAYMENT,
            "process_payment",
            {
                "user_id": user_id,
                "amount": priced["total"],
                "payment_method": order["payment_method"],
                "order_id": order_id,
            },
        )
        await self._step(INVENTORY, "reserve_items", {"order_id": order_id, "items": items})
        return {"items": priced["items"], "total": priced["total"], "payment": payment}

    async def undo(self, order_id: str) -> None:
        """Give the money back and release the goods.

        Raises:
            TaskFailedError: one of the two was not to be had; undo it again later.

        """
        await self._step(PAYMENT, "refund", {"order_id": order_id})
        await self._step(INVENTORY, "release_items", {"order_id": order_id})

    async def _step(self, agent: str, capability: str, payload: dict[str, Any]) -> Any:
        try:
            result = await self._ask(agent, capability, payload, STEP_SECONDS)
        except AgentCallError as error:
            raise TaskFailedError(f"{capability}: {error}") from error
        if result.status != "completed":
            raise TaskFailedError(f"{capability}: {result.error}")
        return result.data
