"""The shop of ``workers/ecommerce`` on a real stack, two processes each of user, order and payment."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import anyio
import pytest

from agentweave_bus import AgentWeaveClient, SpiffeID, TaskResult
from agentweave_bus.config import load_stack
from agentweave_bus.embedded.assembly import LocalStack, local_stack
from agentweave_bus.exceptions import AuthorizationError
from workers.ecommerce.database import DATA_VARIABLE
from workers.ecommerce.directory import ADMIN, GATEWAY, PAYMENT, TRUST_DOMAIN, USER
from workers.ecommerce.goods import Item
from workers.ecommerce.orders import Orders
from workers.ecommerce.payments import Payments
from workers.ecommerce.stock import Stock

pytestmark = pytest.mark.anyio

ISSUER = "https://login.shop.example"
ALICE = {"iss": ISSUER, "sub": "alice"}
MALLORY = {"iss": ISSUER, "sub": "mallory"}
PASSWORD = "correct horse battery"


@dataclass
class Shop:
    local: LocalStack
    web: AgentWeaveClient
    operator: AgentWeaveClient
    state: Path

    async def route(
        self, service: str, action: str, payload: dict[str, Any], principal: dict[str, str] = ALICE
    ) -> TaskResult:
        request = {"service": service, "action": action, "payload": payload}
        return await self.web.call(GATEWAY, "route", request, principal=principal, timeout=20.0)

    async def done(self, service: str, action: str, payload: dict[str, Any]) -> Any:
        result = await self.route(service, action, payload)
        assert result.status == "completed", result.error
        return result.data

    async def administer(self, action: str, payload: dict[str, Any]) -> TaskResult:
        return await self.operator.call(ADMIN, action, payload)

    async def new_user(self) -> str:
        email = f"{os.urandom(6).hex()}@shop.example"
        user = await self.done("user", "create_user", {"email": email, "name": "Alice"})
        return str(user["user_id"])

    async def order(
        self, user_id: str, sku: str, quantity: int, changes: dict[str, Any] | None = None
    ) -> TaskResult:
        items = [{"sku": sku, "quantity": quantity}]
        payload = {"user_id": user_id, "items": items, "payment_method": "credit_card"} | (changes or {})
        return await self.route("order", "create_order", payload)

    async def new_article(self, price: str, available: int) -> str:
        sku = f"T-{os.urandom(4).hex().upper()}"
        result = await self.administer("change_stock", {"sku": sku, "change": available, "price": price})
        assert result.status == "completed", result.error
        return sku

    async def available(self, sku: str) -> int:
        articles = (await self.done("inventory", "list_articles", {}))["articles"]
        return next(article["available"] for article in articles if article["sku"] == sku)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("shop")
        patch.setenv(DATA_VARIABLE, str(directory / "data"))
        yield directory


@pytest.fixture(scope="module")
async def shop(data: Path) -> AsyncIterator[Shop]:
    config = load_stack("workers/ecommerce/agentweave.yaml")
    doubled = {"user.yaml", "order.yaml", "payment.yaml"}
    agents = tuple(
        agent.model_copy(update={"replicas": 2}) if agent.config.name in doubled else agent
        for agent in config.agents
    )
    config = config.model_copy(update={"agents": agents, "state_dir": data / "state"})
    lines: list[str] = []
    async with local_stack(config, lambda name, line: lines.append(f"{name} {line}")) as local:
        files = [local.clients[SpiffeID.of(TRUST_DOMAIN, "client", name)] for name in ("web", "operator")]
        async with AgentWeaveClient(files[0]) as web, AgentWeaveClient(files[1]) as operator:
            yield Shop(local, web, operator, data)
    assert not [line for line in lines if '"level":"ERROR"' in line or "Traceback" in line]


# --- users -----------------------------------------------------------------------------------------------


async def test_every_agent_is_healthy(shop: Shop) -> None:
    health = (await shop.web.call(GATEWAY, "health", {})).data
    names = {"user", "order", "payment", "inventory", "admin"}
    assert health == {"gateway": "healthy", "services": dict.fromkeys(names, "healthy")}


async def test_sign_in_needs_the_password(shop: Shop) -> None:
    account = {"email": "signin@shop.example", "name": "Sign In", "password": PASSWORD}
    made = await shop.done("user", "create_user", account)
    signed_in = await shop.done(
        "user", "authenticate", {"email": "SignIn@shop.example", "password": PASSWORD}
    )
    assert signed_in["user_id"] == made["user_id"]
    wrong = await shop.route("user", "authenticate", {"email": "signin@shop.example", "password": "guess"})
    nobody = await shop.route("user", "authenticate", {"email": "nobody@shop.example", "password": PASSWORD})
    assert (
        (wrong.status, wrong.error) == (nobody.status, nobody.error) == ("failed", "Wrong email or password")
    )


async def test_no_agent_keeps_a_password(shop: Shop) -> None:
    account = {"email": "secret@shop.example", "name": "Secret", "password": "hunter2-hunter2"}
    await shop.done("user", "create_user", account)
    kept = [
        file.name
        for file in shop.state.rglob("*")
        if file.is_file() and b"hunter2-hunter2" in file.read_bytes()
    ]
    assert [name for name in kept if not name.startswith("client-")] == []


async def test_a_profile_is_its_owners(shop: Shop) -> None:
    user_id = await shop.new_user()
    changed = await shop.done("user", "update_profile", {"user_id": user_id, "address": "1 Loom Street"})
    assert changed["profile"] == {"address": "1 Loom Street"}
    assert (await shop.done("user", "get_profile", {"user_id": user_id}))["profile"] == changed["profile"]
    for action in ("get_profile", "update_profile"):
        seen = await shop.route("user", action, {"user_id": user_id}, principal=MALLORY)
        assert seen.status == "failed"
        assert seen.error == f"User {user_id} not found"


async def test_an_email_has_one_account_and_begins_as_free(shop: Shop) -> None:
    account = {"email": "once@shop.example", "name": "Once", "tier": "premium"}
    made = await shop.done("user", "create_user", account)
    assert (made["tier"], made["tier_requested"]) == ("free", "premium")
    again = await shop.route("user", "create_user", {**account, "email": "ONCE@shop.example"})
    assert again.status == "failed"
    assert "already" in str(again.error)


# --- orders ----------------------------------------------------------------------------------------------


async def test_an_order_is_paid_reserved_and_in_the_history(shop: Shop) -> None:
    user_id, sku = await shop.new_user(), await shop.new_article("12.50", 5)
    order = (await shop.order(user_id, sku, 2)).data
    assert (order["status"], order["total"]) == ("confirmed", "25.00")
    assert await shop.available(sku) == 3
    payment = await shop.done("payment", "get_payment", {"order_id": order["order_id"]})
    assert (payment["status"], payment["amount"]) == ("paid", "25.00")
    assert payment["transaction_id"] == order["transaction_id"]
    assert payment["asked_by"]["principal"] == ALICE
    assert await shop.done("order", "get_order", {"order_id": order["order_id"]}) == order
    assert (await shop.done("order", "list_orders", {"user_id": user_id}))["orders"] == [order]


async def test_every_replica_sees_what_another_did(shop: Shop) -> None:
    user_id = await shop.new_user()
    for _ in range(20):
        assert (await shop.done("user", "get_user", {"user_id": user_id}))["user_id"] == user_id
    ran = [await _runs(shop, f"user/{number}", "get_user") for number in (1, 2)]
    assert all(ran), f"one replica has answered nothing: {ran}"


async def test_canceling_gives_money_and_goods_back_once(shop: Shop) -> None:
    user_id, sku = await shop.new_user(), await shop.new_article("7.00", 4)
    order_id = (await shop.order(user_id, sku, 3)).data["order_id"]
    for _ in range(2):
        canceled = await shop.done("order", "cancel_order", {"order_id": order_id})
        assert canceled["status"] == "canceled"
        assert await shop.available(sku) == 4
    assert Payments().find(order_id)["status"] == "refunded"


async def test_a_second_refund_moves_nothing(shop: Shop) -> None:
    user_id, sku = await shop.new_user(), await shop.new_article("9.00", 1)
    order_id = (await shop.order(user_id, sku, 1)).data["order_id"]
    before = Payments().charged()
    answers = [await shop.administer("refund", {"order_id": order_id}) for _ in range(3)]
    assert [answer.data["status"] for answer in answers] == ["refunded"] * 3
    assert Payments().charged() == before - Decimal("9.00")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"user_id": "nobody"}, "get_user: User nobody not found"),
        ({"items": [{"sku": "NO-SUCH", "quantity": 1}]}, "There is no article NO-SUCH"),
        ({"items": [{"sku": "WIDGET-001", "quantity": 1, "price": "0.01"}]}, "costs 19.99, not 0.01"),
        ({"payment_method": "expired_card"}, "The bank declined"),
        ({"items": [{"sku": "GADGET-002", "quantity": 11}]}, "11 of GADGET-002 are wanted"),
    ],
)
async def test_an_order_that_fails_leaves_nothing_behind(
    shop: Shop, changes: dict[str, Any], says: str
) -> None:
    user_id = await shop.new_user()
    before = (Payments().charged(), Stock().articles())
    failed = await shop.order(user_id, "WIDGET-001", 1, changes)
    assert failed.status == "failed"
    assert says in str(failed.error)
    assert (Payments().charged(), Stock().articles()) == before


async def test_a_payment_above_the_grants_limit_is_denied_and_the_order_undone(shop: Shop) -> None:
    user_id, sku = await shop.new_user(), await shop.new_article("5000.01", 2)
    failed = await shop.order(user_id, sku, 2)
    assert failed.status == "failed"
    assert "max_amount 10000 and amount is" in str(failed.error)
    assert await shop.available(sku) == 2


async def test_of_many_who_want_the_last_one_gets_it_and_the_others_their_money(shop: Shop) -> None:
    user_id, sku = await shop.new_user(), await shop.new_article("10.00", 3)
    before = Payments().charged()
    results = await asyncio.gather(*(shop.order(user_id, sku, 3) for _ in range(8)))
    assert sorted(result.status for result in results) == ["completed"] + ["failed"] * 7
    assert await shop.available(sku) == 0
    assert Payments().charged() == before + Decimal("30.00")
    history = (await shop.done("order", "list_orders", {"user_id": user_id}))["orders"]
    assert sorted(order["status"] for order in history) == ["confirmed"] + ["failed"] * 7


@pytest.mark.slow  # it waits for time to pass
async def test_an_order_that_a_crash_left_half_done_is_undone(shop: Shop) -> None:
    sku = await shop.new_article("6.00", 2)
    items = [Item(sku=sku, quantity=2)]
    orders, payments, stock = Orders(), Payments(), Stock()
    order_id = orders.add(os.urandom(8).hex(), "somebody", items, "credit_card")["order_id"]
    payments.charge(order_id, "somebody", Decimal("12.00"), "credit_card", {})
    stock.reserve(order_id, items)
    orders.give_up(order_id, "the process that worked on it died while undoing")
    with anyio.fail_after(30):
        while orders.find(order_id)["status"] != "failed":  # noqa: ASYNC110 - another process does it
            await anyio.sleep(0.1)
    assert payments.find(order_id)["status"] == "refunded"
    assert await shop.available(sku) == 2


# --- what is denied --------------------------------------------------------------------------------------


async def test_the_gateway_does_not_route_what_no_grant_lets_it(shop: Shop) -> None:
    user_id = await shop.new_user()
    for service, action, payload in (
        ("user", "update_tier", {"user_id": user_id, "new_tier": "premium"}),
        ("payment", "refund", {"order_id": "x"}),
        ("inventory", "change_stock", {"sku": "WIDGET-001", "change": 5}),
    ):
        denied = await shop.route(service, action, payload)
        assert denied.status == "failed"
        assert f"no grant lets {GATEWAY} ask" in str(denied.error)
    assert (await shop.done("user", "get_user", {"user_id": user_id}))["tier"] == "free"


async def test_clients_reach_the_gateway_and_nothing_else(shop: Shop) -> None:
    for target, action in ((USER, "get_user"), (PAYMENT, "refund"), (ADMIN, "update_tier")):
        with pytest.raises(AuthorizationError) as denial:
            await shop.web.call(target, action, {})
        assert denial.value.audit_id


async def test_no_client_names_a_principal_of_another_issuer(shop: Shop) -> None:
    stranger = {"iss": "https://login.evil.example", "sub": "alice"}
    with pytest.raises(AuthorizationError, match="grant 1 does not list"):
        await shop.route("user", "get_user", {"user_id": "x"}, principal=stranger)


async def test_only_the_admin_agent_changes_a_tier(shop: Shop) -> None:
    user_id = await shop.new_user()
    tried = await shop.route("order", "upgrade_customer", {"user_id": user_id})
    assert tried.status == "failed"
    assert tried.data["denied"] == "outbound"
    assert tried.data["audit_id"]
    assert (await shop.done("user", "get_user", {"user_id": user_id}))["tier"] == "free"
    await shop.administer("update_tier", {"user_id": user_id, "new_tier": "enterprise"})
    assert (await shop.done("user", "get_user", {"user_id": user_id}))["tier"] == "enterprise"


async def _runs(shop: Shop, worker: str, capability: str) -> int:
    from workers.ecommerce.demo.evidence import handler_runs

    return await handler_runs(shop.local.workers[worker].metrics_url, capability)
