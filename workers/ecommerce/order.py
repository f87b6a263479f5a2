"""The order agent: carries orders out with the help of user, inventory and payment, or undoes them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Final, TypeVar

import anyio.to_thread
from pydantic import Field

from agentweave_bus import DataPart, Message, RetryableError, SecureAgent, TaskResult, capability
from agentweave_bus.exceptions import AgentCallError, AuthorizationError, TaskFailedError
from workers.ecommerce.accounts import Tier
from workers.ecommerce.asking import request_key
from workers.ecommerce.checkout import ASK_SECONDS, Checkout
from workers.ecommerce.directory import USER
from workers.ecommerce.goods import Items
from workers.ecommerce.orders import Orders

__all__ = ["OrderAgent"]

T = TypeVar("T")

ORDER_SECONDS: Final = 30
ANNOUNCING_SECONDS: Final = 2.0
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
        """Take an order: it is paid and reserved when this answers, or nothing of it is left.

        Submitted as a task it goes on behind the last step on record when its worker dies. What undoes it
        belongs to the first step, because it must run for a charge whose answer was lost, too: a step that
        has no result is not undone by a compensation of its own.
        """
        step, seconds = self.context.step, self.context.remaining()
        accept = self._orders.add, request_key(), user_id, items, payment_method
        order = await step("accept", *accept, seconds=seconds, compensate=self._close)
        if order["status"] != "pending":
            return dict(order)
        try:
            quote = await step("quote", self._checkout.quote, order)
            await step("reserve", self._checkout.reserve, order)
            await self.context.progress(0.4, "the goods are reserved")
            payment = await step("charge", self._checkout.charge, order, quote["total"])
            await self.context.progress(0.8, "it is paid")
            done = order["order_id"], quote["items"], quote["total"], payment["transaction_id"]
            order = await step("confirm", self._orders.confirm, *done)
        except TaskFailedError as error:
            self.logger.warning("order %s failed: %s", order["order_id"], error)
            await self._note_failure(order["order_id"], str(error))
            raise
        self.logger.info("confirmed", extra={"order_id": order["order_id"]})
        await self._announce(order)
        return dict(order)

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
        order = await self._note_failure(order_id, "canceled by the customer")
        try:
            return await self._undo(order_id)
        except (TaskFailedError, RetryableError) as error:
            self.logger.warning("order %s is not undone yet: %s", order_id, error)
            return order  # the sweep goes on with it

    @capability("upgrade_customer")
    async def upgrade_customer(self, user_id: str, new_tier: Tier = "premium") -> TaskResult:
        """Thank a good customer with a better tier. No grant allows that, so it fails, and says why.

        It stands for the feature that somebody writes without asking who may do such things.
        """
        try:
            return await self.call_agent(
                USER, "update_tier", {"user_id": user_id, "new_tier": new_tier}, timeout=ASK_SECONDS
            )
        except AuthorizationError as denial:
            facts = {"denied": denial.direction, "reason": denial.reason, "audit_id": denial.audit_id}
            return _failed(f"Not allowed: {denial.reason}", facts)
        except AgentCallError as error:
            return _failed(str(error), {})

    async def _announce(self, order: dict[str, Any]) -> None:
        """Publish that an order is confirmed. Nobody's order fails because nobody could be told."""
        told = {key: order[key] for key in ("order_id", "user_id", "total")}
        try:
            with anyio.fail_after(ANNOUNCING_SECONDS):
                await self.publish("order.confirmed", told, key=order["order_id"])
        except (AgentCallError, TimeoutError) as error:
            self.logger.warning("order %s is confirmed, and not announced: %s", order["order_id"], error)

    # --- undoing ------------------------------------------------------------------------------------

    async def _close(self, order: dict[str, Any]) -> None:
        """Leave nothing of an order: what compensates its acceptance."""
        await self._note_failure(order["order_id"], "it could not be carried out")
        await self._undo(order["order_id"])

    async def _note_failure(self, order_id: str, reason: str) -> dict[str, Any]:
        return await _stored(lambda: self._orders.give_up(order_id, reason))

    async def _undo(self, order_id: str) -> dict[str, Any]:
        await self._checkout.undo(order_id)
        return await _stored(lambda: self._orders.undone(order_id))

    async def _undo_leftovers(self) -> None:
        """Undo what neither a call nor a task undoes any more, until it is undone.

        A call's compensations are lost with its process, and where they fail nobody repeats them; a task's
        are lost with its deadline.
        """
        while True:
            try:
                for order_id in await _stored(self._orders.to_undo):
                    await self._note_failure(order_id, "it was never finished")
                    await self._try_to_undo(order_id)
            except Exception:
                self.logger.exception("the look for orders to undo failed; it is repeated")
            await asyncio.sleep(SWEEP_SECONDS)

    async def _try_to_undo(self, order_id: str) -> None:
        try:
            await self._undo(order_id)
        except (TaskFailedError, RetryableError) as error:
            self.logger.warning("order %s is not undone yet: %s", order_id, error)


async def _stored(act: Callable[[], T]) -> T:
    """Do an act on the database in a thread: it may have to wait for another replica's."""
    return await anyio.to_thread.run_sync(act)


def _failed(error: str, facts: dict[str, Any]) -> TaskResult:
    message = Message(role="assistant", parts=[DataPart(data=facts)])
    return TaskResult(status="failed", messages=[message], error=error)
