"""The order agent: carries orders out with the help of user, inventory and payment, or undoes them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Annotated, Any, Final, TypeVar

import anyio.to_thread
from pydantic import Field

from agentweave_bus import DataPart, Message, SecureAgent, TaskResult, capability
from agentweave_bus.exceptions import AgentCallError, AuthorizationError, TaskFailedError
from workers.ecommerce.accounts import Tier
from workers.ecommerce.asking import request_key
from workers.ecommerce.checkout import STEP_SECONDS, Checkout
from workers.ecommerce.directory import USER
from workers.ecommerce.goods import Items
from workers.ecommerce.orders import Orders

__all__ = ["OrderAgent"]

T = TypeVar("T")

ORDER_SECONDS: Final = 30
ABANDONED_AFTER: Final = timedelta(seconds=2 * ORDER_SECONDS)
"""A pending order that is older than any request can be has lost the process that worked on it."""
SWEEP_SECONDS: Final = 5.0


class OrderAgent(SecureAgent):
    """Manages customers' orders."""

    def on_start(self) -> None:
        """Open the orders, and begin to look for those that are to be undone."""
        self._orders = Orders()
        self._checkout = Checkout(self.call_agent)
        self._sweeper = asyncio.create_task(self._undo_leftovers(), name="undo-leftovers")

    async def on_stop(self) -> None:
        """Stop looking."""
        self._sweeper.cancel()
        with suppress(asyncio.CancelledError):
            await self._sweeper

    @capability("create_order", timeout=ORDER_SECONDS)
    async def create_order(self, user_id: str, items: Items, payment_method: str) -> dict[str, Any]:
        """Take an order: it is paid and reserved when this answers, or nothing of it is left."""
        order = await _stored(lambda: self._orders.add(request_key(), user_id, items, payment_method))
        if order["status"] != "pending":
            return order
        order_id = order["order_id"]
        try:
            done = await self._checkout.carry_out(order)
            return await _stored(
                lambda: self._orders.confirm(
                    order_id, done["items"], done["total"], done["payment"]["transaction_id"]
                )
            )
        except TaskFailedError as error:
            self.logger.warning("order %s failed: %s", order_id, error)
            await self._give_up(order_id, str(error))
            raise TaskFailedError(f"Failed to create order: {error}") from error

    @capability("get_order", safe=True)
    async def get_order(self, order_id: str) -> dict[str, Any]:
        """Show an order."""
        return await _stored(lambda: self._orders.find(order_id))

    @capability("list_orders", safe=True)
    async def list_orders(
        self, user_id: str, limit: Annotated[int, Field(ge=1, le=100)] = 20
    ) -> dict[str, Any]:
        """Show a user's latest orders, newest first."""
        return {"orders": await _stored(lambda: self._orders.of_user(user_id, limit))}

    @capability("cancel_order", timeout=ORDER_SECONDS)
    async def cancel_order(self, order_id: str) -> dict[str, Any]:
        """Cancel an order: the money goes back and so do the goods."""
        order = await _stored(lambda: self._orders.find(order_id))
        if order["status"] == "pending":
            raise TaskFailedError(f"Order {order_id} is being carried out; cancel it afterwards")
        return await self._give_up(order_id, "canceled by the customer")

    @capability("upgrade_customer")
    async def upgrade_customer(self, user_id: str, new_tier: Tier = "premium") -> TaskResult:
        """Thank a good customer with a better tier. No grant allows that, so it fails, and says why.

        It stands for the feature that somebody writes without asking who may do such things.
        """
        try:
            return await self.call_agent(
                USER, "update_tier", {"user_id": user_id, "new_tier": new_tier}, timeout=STEP_SECONDS
            )
        except AuthorizationError as denial:
            facts = {"denied": denial.direction, "reason": denial.reason, "audit_id": denial.audit_id}
            return _failed(f"Not allowed: {denial.reason}", facts)
        except AgentCallError as error:
            return _failed(str(error), {})

    async def _give_up(self, order_id: str, reason: str) -> dict[str, Any]:
        """Undo an order now, or leave it to the sweep."""
        order = await _stored(lambda: self._orders.give_up(order_id, reason))
        try:
            await self._checkout.undo(order_id)
        except TaskFailedError as error:
            self.logger.warning("order %s is not undone yet: %s", order_id, error)
            return order
        return await _stored(lambda: self._orders.undone(order_id))

    async def _undo_leftovers(self) -> None:
        """Undo what a crash, a lost answer or an absent agent left behind, until it is undone."""
        while True:
            try:
                for order_id in await _stored(lambda: self._orders.to_undo(ABANDONED_AFTER)):
                    await self._give_up(order_id, "it was never finished")
            except Exception:
                self.logger.exception("the look for orders to undo failed; it is repeated")
            await asyncio.sleep(SWEEP_SECONDS)


async def _stored(act: Callable[[], T]) -> T:
    """Do an act on the database in a thread: it may have to wait for another replica's."""
    return await anyio.to_thread.run_sync(act)


def _failed(error: str, facts: dict[str, Any]) -> TaskResult:
    message = Message(role="assistant", parts=[DataPart(data=facts)])
    return TaskResult(status="failed", messages=[message], error=error)
