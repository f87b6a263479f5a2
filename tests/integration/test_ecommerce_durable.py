"""Orders of the shop as durable tasks, on a real stack with its agents as processes: crashes, declined
payments, keys that are used twice, and the event that tells of a confirmed order."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import pytest

from agentweave_bus import TaskHandle
from agentweave_bus.exceptions import AuthorizationError, IdempotencyError, TaskCanceledError
from workers.ecommerce.demo.durable import held, killed_once_paid, until
from workers.ecommerce.demo.evidence import available, charged, handler_runs
from workers.ecommerce.demo.stage import PRINCIPAL, Stage, open_stage
from workers.ecommerce.directory import ORDER, PAYMENT, USER
from workers.ecommerce.orders import Orders

pytestmark = pytest.mark.anyio

PATIENCE = 60.0


@pytest.fixture(scope="module")
async def stage(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    async with open_stage(tmp_path_factory.mktemp("shop")) as stage:
        yield stage


@pytest.fixture
async def user_id(stage: Stage) -> str:
    email = f"{os.urandom(6).hex()}@shop.example"
    made = await stage.route("user", "create_user", {"email": email, "name": "Alice"})
    return str(made.data["user_id"])


def two_widgets(user_id: str, method: str = "credit_card") -> dict[str, Any]:
    return {
        "user_id": user_id,
        "items": [{"sku": "WIDGET-001", "quantity": 2, "price": "19.99"}],
        "payment_method": method,
    }


async def submit(stage: Stage, wanted: dict[str, Any], key: str | None = None) -> TaskHandle:
    return await stage.web.submit(ORDER, "create_order", wanted, idempotency_key=key, principal=PRINCIPAL)


def orders(user_id: str) -> list[tuple[str, str | None]]:
    return [(one["status"], one["total"]) for one in Orders().of_user(user_id, 100)]


async def charges(stage: Stage) -> int:
    return await handler_runs(stage.workers["payment"].metrics_url, "process_payment")


async def test_a_worker_killed_between_paying_and_confirming_is_followed_by_one_that_confirms(
    stage: Stage, user_id: str
) -> None:
    paid, widgets, ran = charged(), available(), await charges(stage)
    handle = await killed_once_paid(stage, two_widgets(user_id), "killed")
    assert orders(user_id) == [("pending", None)]
    assert charged() == paid + Decimal("39.98")
    await stage.restart("order")
    order = (await handle.result(PATIENCE)).data
    assert (order["status"], order["total"]) == ("confirmed", "39.98")
    assert orders(user_id) == [("confirmed", "39.98")]
    assert (charged(), available()) == (paid + Decimal("39.98"), widgets - 2)
    assert await charges(stage) == ran + 1
    assert (await handle.status()).attempt > 1


async def test_a_declined_payment_releases_the_goods(stage: Stage, user_id: str) -> None:
    before = (charged(), available())
    result = await (await submit(stage, two_widgets(user_id, "expired_card"))).result(PATIENCE)
    declined = "process_payment: The bank declined: the card has expired"
    assert (result.status, result.error) == ("failed", declined)
    assert (charged(), available()) == before
    (order,) = Orders().of_user(user_id, 10)
    assert (order["status"], order["reason"]) == ("failed", declined)


async def test_one_key_is_one_order(stage: Stage, user_id: str) -> None:
    paid = charged()
    handles = await asyncio.gather(*(submit(stage, two_widgets(user_id), "cart-1") for _ in range(2)))
    first, second = [await one.result(PATIENCE) for one in handles]
    later = await (await submit(stage, two_widgets(user_id), "cart-1")).result(PATIENCE)
    assert first.data == second.data == later.data
    assert orders(user_id) == [("confirmed", "39.98")]
    assert charged() == paid + Decimal("39.98")
    other = two_widgets(user_id, "invoice")
    with pytest.raises(IdempotencyError):
        await (await submit(stage, other, "cart-1")).result(PATIENCE)


async def test_an_order_that_is_cancelled_on_the_way_is_undone(stage: Stage, user_id: str) -> None:
    before = (charged(), available())
    with held("payments"):  # until the goods are reserved
        handle = await submit(stage, two_widgets(user_id))
        await until(lambda: available() < before[1], "nothing was reserved")
        cancelling = asyncio.create_task(handle.cancel("changed my mind", timeout=PATIENCE))
        await until(lambda: orders(user_id)[0][0] != "pending", "the order was not given up")
    await cancelling
    with pytest.raises(TaskCanceledError, match="changed my mind"):
        await handle.result(PATIENCE)
    assert (charged(), available()) == before
    ((state, _),) = orders(user_id)
    assert state in {"failed", "canceled"}  # the latter where it was confirmed just before


async def test_payment_learns_on_whose_behalf(stage: Stage, user_id: str) -> None:
    order = (await (await submit(stage, two_widgets(user_id))).result(PATIENCE)).data
    asked = await stage.route("payment", "get_payment", {"order_id": order["order_id"]})
    assert asked.data["asked_by"]["chain"] == [str(stage.web.spiffe_id), str(ORDER)]
    assert asked.data["asked_by"]["principal"] == PRINCIPAL


async def test_a_confirmed_order_is_heard_of_and_a_declined_one_is_not(stage: Stage, user_id: str) -> None:
    for method in ("expired_card", "credit_card"):
        await (await submit(stage, two_widgets(user_id, method))).result(PATIENCE)
    await stage.route("order", "create_order", two_widgets(user_id))

    async def counted() -> int:
        profile = await stage.route("user", "get_profile", {"user_id": user_id})
        return int(profile.data["orders"])

    async with asyncio.timeout(PATIENCE):
        while await counted() < 2:  # noqa: ASYNC110 - another process counts
            await asyncio.sleep(0.02)
    assert await counted() == 2


async def test_clients_submit_orders_and_nothing_else(stage: Stage, user_id: str) -> None:
    for target, name in ((ORDER, "cancel_order"), (PAYMENT, "refund"), (USER, "update_tier")):
        with pytest.raises(AuthorizationError):
            await stage.web.submit(target, name, {})
    with pytest.raises(AuthorizationError):
        await stage.web.call(ORDER, "create_order", two_widgets(user_id))
