"""What carries an order out, one ask after another, and what undoes it.

Undoing asks for a refund and a release, whatever was reached: both are harmless where there is nothing to
undo, and both bar what is still on its way. So it doesn't matter where an order broke off, or whether an
answer was lost. Asking twice for the same order does what asking once does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from agentweave_bus import AgentCallError, RetryableError, TaskResult
from agentweave_bus.exceptions import CallRefusedError, CallTimeoutError, TaskFailedError, UnreachableError
from workers.ecommerce.directory import INVENTORY, PAYMENT, USER

__all__ = ["Ask", "Checkout"]

ASK_SECONDS: Final = 10.0

Ask = Callable[[str, str, Any, float], Awaitable[TaskResult]]
"""``SecureAgent.call_agent``: target, capability, payload, timeout in seconds."""


class Checkout:
    """Carries orders out and undoes them, by asking the other agents.

    Every method raises ``TaskFailedError`` where the answer is no, and ``RetryableError`` where there was
    none or it was to come later; the message says what was asked for and why.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask_agent = ask

    async def quote(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Return the priced ``items`` and their ``total``, if there is such a user and all are there."""
        await self._ask(USER, "get_user", {"user_id": order["user_id"]})
        return dict(await self._ask(INVENTORY, "check_availability", {"items": order["items"]}))

    async def reserve(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Reserve the goods."""
        wanted = {"order_id": order["order_id"], "items": order["items"]}
        return dict(await self._ask(INVENTORY, "reserve_items", wanted))

    async def charge(self, order: Mapping[str, Any], total: str) -> dict[str, Any]:
        """Charge ``total``; return the payment."""
        asked = {key: order[key] for key in ("user_id", "payment_method", "order_id")}
        return dict(await self._ask(PAYMENT, "process_payment", {**asked, "amount": total}))

    async def undo(self, order_id: str) -> None:
        """Give the money back and release the goods."""
        await self._ask(PAYMENT, "refund", {"order_id": order_id})
        await self._ask(INVENTORY, "release_items", {"order_id": order_id})

    async def _ask(self, agent: str, capability: str, payload: dict[str, Any]) -> Any:
        try:
            result = await self._ask_agent(agent, capability, payload, ASK_SECONDS)
        except (CallTimeoutError, UnreachableError) as error:
            raise RetryableError(f"{capability}: {error}") from error
        except CallRefusedError as error:
            if error.retry_after is None:
                raise TaskFailedError(f"{capability}: {error}") from error
            raise RetryableError(f"{capability}: {error}", retry_after=error.retry_after) from error
        except AgentCallError as error:
            raise TaskFailedError(f"{capability}: {error}") from error
        if result.status != "completed":
            raise TaskFailedError(f"{capability}: {result.error}")
        return result.data
