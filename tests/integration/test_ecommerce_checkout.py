"""Orders that break off: at each ask, before it was done or after, with its answer lost or with the process.

The real handlers and databases of all four agents, in this process; what is put between them is the fault.
(On a stack a fault can't be placed at an ask; ``test_ecommerce.py`` and ``test_ecommerce_durable.py`` have
those that can.)
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus import RetryableError, SecureAgent, TaskResult
from agentweave_bus.agent import bind_context
from agentweave_bus.agent.attempts import Attempt
from agentweave_bus.agent.context import RequestContext
from agentweave_bus.exceptions import CallTimeoutError, TaskFailedError
from tests.unit.agent.step_store import Crash as StoreCrash
from tests.unit.agent.step_store import MemoryStore
from workers.ecommerce.accounts import Accounts
from workers.ecommerce.checkout import Checkout
from workers.ecommerce.database import DATA_VARIABLE
from workers.ecommerce.directory import INVENTORY, ORDER, PAYMENT, USER
from workers.ecommerce.goods import Item
from workers.ecommerce.inventory import InventoryAgent
from workers.ecommerce.order import OrderAgent
from workers.ecommerce.orders import Orders
from workers.ecommerce.payment import PaymentAgent
from workers.ecommerce.payments import Payments
from workers.ecommerce.stock import Stock
from workers.ecommerce.user import UserAgent

pytestmark = pytest.mark.anyio

CLIENT = "spiffe://agentweave.io/client/web"
WIDGETS = [Item(sku="WIDGET-001", quantity=2)]
ASKS = ["get_user", "check_availability", "reserve_items", "process_payment"]
Fault = Callable[[str, bool], None]


@pytest.fixture(autouse=True)
def _own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))


class Shop:
    """Three agents in this process, asked as the order agent asks them; ``fault`` may raise."""

    def __init__(self, fault: Fault = lambda _capability, _done: None) -> None:
        self._agents: dict[str, SecureAgent] = {}
        self.fault = fault
        self.done: list[str] = []
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
        self.done.append(capability)
        self.fault(capability, True)
        return result


class Crash(KeyboardInterrupt):
    """The end of a process: nothing in it catches that."""


@asynccontextmanager
async def order_agent(shop: Shop) -> AsyncIterator[tuple[SecureAgent, list[str]]]:
    """An order agent of its own over the shop's databases, and the events that it published."""
    agent, published = OrderAgent.from_config("workers/ecommerce/order.yaml"), []

    async def publish(name: str, _data: Any, *, key: str) -> None:
        published.append(f"{name} {key}")

    agent.call_agent = shop.ask  # type: ignore[method-assign, assignment]
    agent.publish = publish  # type: ignore[method-assign, assignment]
    agent.on_start()
    agent._sweeper.cancel()  # what is undone here, is undone by compensations
    try:
        yield agent, published
    finally:
        await agent.on_stop()


def payload(method: str = "credit_card") -> dict[str, Any]:
    user = Accounts().create("r", "a@shop.example", "A", tier="free", password=None, owner=None)
    items = [item.to_json() for item in WIDGETS]
    return {"user_id": user["user_id"], "items": items, "payment_method": method}


async def called(shop: Shop, wanted: dict[str, Any]) -> TaskResult:
    async with order_agent(shop) as (agent, _):
        bound = agent.capability_table.resolve("create_order")
        with bind_context(RequestContext(caller_spiffe_id=CLIENT, task_id="call-1")):
            return await bound.invoke(bound.validate(wanted))


async def attempted(
    shop: Shop,
    wanted: dict[str, Any],
    store: MemoryStore,
    attempt: int,
    *,
    last: bool = False,
    task: str = "task-1",
) -> Attempt:
    """Work once on a task, in a process of its own as far as the order agent can see."""
    async with order_agent(shop) as (agent, _):
        bound = agent.capability_table.resolve("create_order")
        context = RequestContext(caller_spiffe_id=CLIENT, task_id=task, kind="task", attempt=attempt)
        with bind_context(context):
            return await bound.attempt(bound.validate(wanted), last_attempt=last, store=store)


def lost(capability: str, *, done: bool, error: type[BaseException] = CallTimeoutError) -> Fault:
    def fault(asked: str, was_done: bool) -> None:
        if asked == capability and was_done is done:
            raise error("no answer")

    return fault


def no_fault(_capability: str, _done: bool) -> None:
    pass


def widgets() -> int:
    return next(int(one["available"]) for one in Stock().articles() if one["sku"] == "WIDGET-001")


def assert_nothing_is_left(user_id: str) -> None:
    (order,) = Orders().of_user(user_id, 10)
    assert order["status"] == "failed"
    assert (Payments().charged(), widgets()) == (Decimal(0), 100)


def assert_carried_out_once(user_id: str) -> None:
    (order,) = Orders().of_user(user_id, 10)
    assert (order["status"], order["total"]) == ("confirmed", "39.98")
    assert (Payments().charged(), widgets()) == (Decimal("39.98"), 98)


# --- as a call ---------------------------------------------------------------------------------------------


async def test_with_no_fault_it_is_charged_reserved_and_told() -> None:
    wanted = payload()
    async with order_agent(Shop()) as (agent, published):
        bound = agent.capability_table.resolve("create_order")
        with bind_context(RequestContext(caller_spiffe_id=CLIENT, task_id="call-1")):
            result = await bound.invoke(bound.validate(wanted))
    assert_carried_out_once(wanted["user_id"])
    assert published == [f"order.confirmed {result.data['order_id']}"]


@pytest.mark.parametrize("done", [False, True], ids=["before", "answer-lost"])
@pytest.mark.parametrize("ask", ASKS)
async def test_wherever_a_call_breaks_off_nothing_is_left(ask: str, done: bool) -> None:
    wanted = payload()
    result = await called(Shop(lost(ask, done=done)), wanted)
    assert (result.status, result.error) == ("failed", f"{ask}: no answer")
    assert_nothing_is_left(wanted["user_id"])


async def test_a_declined_payment_releases_the_goods_and_the_order_says_why() -> None:
    wanted, shop = payload("expired_card"), Shop()
    result = await called(shop, wanted)
    assert result.error == "process_payment: The bank declined: the card has expired"
    assert shop.done[2:] == ["reserve_items", "process_payment", "refund", "release_items"]
    assert_nothing_is_left(wanted["user_id"])
    assert Orders().of_user(wanted["user_id"], 1)[0]["reason"] == result.error


@pytest.mark.parametrize("ask", ["refund", "release_items"])
async def test_undoing_that_breaks_off_is_done_by_undoing_again(ask: str) -> None:
    wanted, shop = payload("expired_card"), Shop(lost(ask, done=True))
    result = await called(shop, wanted)
    assert "the compensation of step 'accept' failed" in str(result.error)
    (order,) = Orders().of_user(wanted["user_id"], 10)
    assert order["status"] == "failing"
    assert Orders().to_undo() == [order["order_id"]]
    shop.fault = no_fault
    await Checkout(shop.ask).undo(order["order_id"])
    Orders().undone(order["order_id"])
    assert_nothing_is_left(wanted["user_id"])


async def test_what_arrives_after_its_order_was_given_up_does_nothing() -> None:
    user_id = payload()["user_id"]
    order, shop = Orders().add("r", user_id, WIDGETS, "credit_card"), Shop()
    await Checkout(shop.ask).undo(order["order_id"])
    with pytest.raises(TaskFailedError, match="given up"):
        await Checkout(shop.ask).charge(order, "39.98")
    with pytest.raises(TaskFailedError, match="given up"):
        await Checkout(shop.ask).reserve(order)
    assert (Payments().charged(), widgets()) == (Decimal(0), 100)


async def test_what_may_pass_may_be_asked_again() -> None:
    order = Orders().add("r", payload()["user_id"], WIDGETS, "credit_card")
    with pytest.raises(RetryableError, match="process_payment: no answer"):
        await Checkout(Shop(lost("process_payment", done=True)).ask).charge(order, "39.98")


# --- as a task ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("ask", ASKS)
async def test_wherever_its_worker_dies_a_task_is_carried_out_once(ask: str, done: bool) -> None:
    wanted, store, shop = payload(), MemoryStore(), Shop(lost(ask, done=done, error=Crash))
    with pytest.raises(Crash):
        await attempted(shop, wanted, store, 1)
    shop.fault = no_fault
    ended = await attempted(shop, wanted, store, 2)
    assert (ended.result.status, ended.retry) == ("completed", False)
    assert_carried_out_once(wanted["user_id"])
    others = [one for one in ASKS if one not in (ask, "get_user", "check_availability")]
    assert [shop.done.count(one) for one in others] == [1] * len(others)


@pytest.mark.parametrize("method", ["credit_card", "expired_card"])
@pytest.mark.slow  # many orders, one for each place
async def test_whatever_is_on_record_when_its_worker_dies_there_is_one_order_or_none(method: str) -> None:
    wanted, shop = payload(method), Shop()
    told = set()
    for number in range(1, 100):
        for crash in (-number, number):
            store = MemoryStore(crash)
            try:
                await attempted(shop, wanted, store, 1, task=f"task-{crash}")
            except StoreCrash:
                ended = await attempted(shop, wanted, store, 2, task=f"task-{crash}")
                told.add((ended.result.status, ended.result.error))
        if store.operations < number:  # there are no more to die at
            break
    carried_out = method == "credit_card"
    error = None if carried_out else "process_payment: The bank declined: the card has expired"
    assert told == {("completed" if carried_out else "failed", error)}
    made = Orders().of_user(wanted["user_id"], 100)
    assert {order["status"] for order in made} == {"confirmed" if carried_out else "failed"}
    assert Payments().charged() == (Decimal("39.98") * len(made) if carried_out else 0)
    assert widgets() == 100 - (2 * len(made) if carried_out else 0)
    assert len(made) > 10


async def test_an_answer_that_is_lost_again_and_again_is_undone_at_last() -> None:
    wanted, store, shop = payload(), MemoryStore(), Shop(lost("process_payment", done=True))
    first = await attempted(shop, wanted, store, 1)
    assert first.retry
    assert Payments().charged() == Decimal("39.98")
    last = await attempted(shop, wanted, store, 2, last=True)
    assert (last.retry, last.result.error) == (False, "process_payment: no answer")
    assert_nothing_is_left(wanted["user_id"])


@pytest.mark.parametrize("ask", ["refund", "release_items"])
async def test_a_worker_that_dies_while_it_undoes_is_followed_by_one_that_goes_on(ask: str) -> None:
    wanted, store, shop = payload("expired_card"), MemoryStore(), Shop(lost(ask, done=True, error=Crash))
    with pytest.raises(Crash):
        await attempted(shop, wanted, store, 1)
    shop.fault = no_fault
    ended = await attempted(shop, wanted, store, 2)
    assert ended.result.error == "process_payment: The bank declined: the card has expired"
    assert_nothing_is_left(wanted["user_id"])


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
    busy = orders.add("r1", "u", WIDGETS, "credit_card", seconds=float("inf"))["order_id"]
    assert orders.to_undo() == []
    order_id = orders.add("r2", "u", WIDGETS, "credit_card", seconds=-31.0)["order_id"]
    assert orders.to_undo() == [order_id]
    assert orders.give_up(order_id, "abandoned")["status"] == "failing"
    with pytest.raises(TaskFailedError, match="given up"):
        orders.confirm(order_id, [], "39.98", "txn")
    assert orders.undone(order_id)["status"] == "failed"
    assert orders.to_undo() == []
    assert orders.find(busy)["status"] == "pending"


def test_confirming_twice_is_confirming() -> None:
    orders = Orders()
    order_id = orders.add("r", "u", WIDGETS, "credit_card")["order_id"]
    confirmed = [orders.confirm(order_id, [], "39.98", "txn") for _ in range(2)]
    assert confirmed[0] == confirmed[1]


def test_a_confirmed_order_is_counted_once() -> None:
    accounts = Accounts()
    user_id = accounts.create("r", "a@shop.example", "A", tier="free", password=None, owner=None)["user_id"]
    for order_id in ("o-1", "o-2", "o-1"):
        accounts.note_order(order_id, user_id)
    assert accounts.profile(user_id, None)["orders"] == 2


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
