"""Orders that break off: at each step, before it was done or after, with its answer lost.

The real handlers and databases of user, payment and inventory, in this process; what is put between them
is the fault. (On a stack a fault can't be placed at a step; ``test_ecommerce.py`` has those that can.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus import SecureAgent, TaskResult
from agentweave_bus.agent import bind_context
from agentweave_bus.agent.context import RequestContext
from agentweave_bus.exceptions import CallTimeoutError, TaskFailedError
from workers.ecommerce.accounts import Accounts
from workers.ecommerce.checkout import Checkout
from workers.ecommerce.database import DATA_VARIABLE
from workers.ecommerce.directory import INVENTORY, ORDER, PAYMENT, USER
from workers.ecommerce.goods import Item
from workers.ecommerce.inventory import InventoryAgent
from workers.ecommerce.orders import Orders
from workers.ecommerce.payment import PaymentAgent
from workers.ecommerce.payments import Payments
from workers.ecommerce.stock import Stock
from workers.ecommerce.user import UserAgent

pytestmark = pytest.mark.anyio

WIDGETS = [Item(sku="WIDGET-001", quantity=2)]
Fault = Callable[[str, bool], None]


@pytest.fixture(autouse=True)
def _own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))


class Shop:
    """Three agents in this process, asked as the order agent asks them; ``fault`` may raise."""

    def __init__(self, fault: Fault = lambda _capability, _done: None) -> None:
        self._agents: dict[str, SecureAgent] = {}
        self.fault = fault
        for spiffe_id, kind in ((USER, UserAgent), (PAYMENT, PaymentAgent), (INVENTORY, InventoryAgent)):
            name = spiffe_id.path.rpartition("/")[2]
            agent = kind.from_config(Path("workers/ecommerce") / f"{name}.yaml")
            agent.on_start()
            self._agents[spiffe_id] = agent

    async def ask(self, target: str, capability: str, payload: Any, _timeout: float) -> TaskResult:
        self.fault(capability, False)
        bound = self._agents[target].capability_table.resolve(capability)
        with bind_context(RequestContext(caller_spiffe_id=str(ORDER), task_id=os.urandom(8).hex())):
            result = await bound.invoke(bound.validate(payload))
        self.fault(capability, True)
        return result


def lost(capability: str, *, done: bool) -> Fault:
    def fault(asked: str, was_done: bool) -> None:
        if asked == capability and was_done is done:
            raise CallTimeoutError("no answer")

    return fault


def new_order() -> dict[str, Any]:
    user = Accounts().create("r", "a@shop.example", "A", tier="free", password=None, owner=None)
    return Orders().add("r", user["user_id"], WIDGETS, "credit_card")


def widgets() -> int:
    return next(int(one["available"]) for one in Stock().articles() if one["sku"] == "WIDGET-001")


async def test_with_no_fault_it_is_charged_and_reserved() -> None:
    done = await Checkout(Shop().ask).carry_out(new_order())
    assert (done["total"], Payments().charged(), widgets()) == ("39.98", Decimal("39.98"), 98)


@pytest.mark.parametrize("done", [False, True], ids=["before", "answer-lost"])
@pytest.mark.parametrize("step", ["get_user", "check_availability", "process_payment", "reserve_items"])
async def test_wherever_it_breaks_off_undoing_leaves_nothing(step: str, done: bool) -> None:
    order = new_order()
    checkout = Checkout(Shop(lost(step, done=done)).ask)
    with pytest.raises(TaskFailedError, match=f"{step}: no answer"):
        await checkout.carry_out(order)
    await checkout.undo(order["order_id"])
    await checkout.undo(order["order_id"])
    assert (Payments().charged(), widgets()) == (Decimal(0), 100)


@pytest.mark.parametrize("step", ["refund", "release_items"])
async def test_undoing_that_breaks_off_is_done_by_undoing_again(step: str) -> None:
    order, shop = new_order(), Shop()
    checkout = Checkout(shop.ask)
    await checkout.carry_out(order)
    shop.fault = lost(step, done=True)
    with pytest.raises(TaskFailedError, match=step):
        await checkout.undo(order["order_id"])
    shop.fault = lambda _capability, _done: None
    await checkout.undo(order["order_id"])
    assert (Payments().charged(), widgets()) == (Decimal(0), 100)


async def test_a_step_that_arrives_after_its_order_was_given_up_does_nothing() -> None:
    order, shop = new_order(), Shop()
    await Checkout(shop.ask).undo(order["order_id"])
    with pytest.raises(TaskFailedError, match="given up"):
        await Checkout(shop.ask).carry_out(order)
    with pytest.raises(TaskFailedError, match="given up"):
        Stock().reserve(order["order_id"], WIDGETS)
    assert (Payments().charged(), widgets()) == (Decimal(0), 100)


# --- once, however often it is asked -----------------------------------------------------------------------


def test_the_same_request_acts_once() -> None:
    stock, payments = Stock(), Payments()
    assert [stock.change("r1", "WIDGET-001", 5, None)["available"] for _ in range(2)] == [105, 105]
    assert stock.change("r2", "WIDGET-001", 5, None)["available"] == 110
    orders = [Orders().add("r1", "u", WIDGETS, "credit_card")["order_id"] for _ in range(2)]
    assert orders[0] == orders[1]
    charges = [payments.charge(orders[0], "u", Decimal("39.98"), "credit_card", {}) for _ in range(2)]
    assert charges[0] == charges[1]
    assert payments.charged() == Decimal("39.98")
    with pytest.raises(TaskFailedError, match="another amount"):
        payments.charge(orders[0], "u", Decimal("1.00"), "credit_card", {})


def test_an_order_that_nobody_works_on_any_more_is_found() -> None:
    orders = Orders()
    order_id = orders.add("r", "u", WIDGETS, "credit_card")["order_id"]
    assert orders.to_undo(timedelta(minutes=1)) == []
    assert orders.to_undo(timedelta(0)) == [order_id]
    assert orders.give_up(order_id, "abandoned")["status"] == "failing"
    with pytest.raises(TaskFailedError, match="given up"):
        orders.confirm(order_id, [], "39.98", "txn")
    assert orders.undone(order_id)["status"] == "failed"
    assert orders.to_undo(timedelta(0)) == []


def test_an_act_that_fails_is_not_half_done() -> None:
    stock = Stock()
    with pytest.raises(TaskFailedError, match="GADGET-002"):
        stock.reserve("o", [Item(sku="WIDGET-001", quantity=2), Item(sku="GADGET-002", quantity=999)])
    assert widgets() == 100
    assert stock.release("o")["reserved"] == {}


def test_passwords_are_hashed(tmp_path: Path) -> None:
    Accounts().create("r", "p@shop.example", "P", tier="free", password="open sesame", owner=None)
    assert Accounts().authenticate("p@shop.example", "open sesame")["email"] == "p@shop.example"
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"scrypt$" in stored
    assert b"open sesame" not in stored
