"""The reference's e-commerce example: its agents as processes, its policies, its order through the gateway."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from agentweave_bus import AgentWeaveClient
from agentweave_bus.authz import verify_audit
from agentweave_bus.embedded.stack import StackSettings, embedded_stack
from agentweave_bus.exceptions import AuthorizationError
from agentweave_bus.spiffe_id import SpiffeID

pytestmark = pytest.mark.anyio

DOMAIN = "agentweave.io"
AGENTS = ("gateway", "user", "order", "payment", "inventory")
GATEWAY = f"spiffe://{DOMAIN}/agent/gateway"
USER = f"spiffe://{DOMAIN}/agent/user"


def agent(name: str) -> SpiffeID:
    return SpiffeID(f"spiffe://{DOMAIN}/agent/{name}")


CLI = SpiffeID(f"spiffe://{DOMAIN}/client/cli")


@dataclass(frozen=True)
class Shop:
    folder: Path
    client: AgentWeaveClient
    connect: Callable[[str, SpiffeID], Any]
    running: dict[str, Any]
    types: Callable[[str], Any]

    async def route(self, service: str, action: str, payload: dict[str, Any]) -> Any:
        """What the reference types as ``agentweave call --target …/gateway --capability route``."""
        return await self.client.call(
            GATEWAY, "route", {"service": service, "action": action, "payload": payload}
        )

    def audit(self, name: str) -> str:
        """Return the records of one agent."""
        logs = (self.folder / "audit").glob(f"{name}_agent.*.jsonl")
        return "".join(path.read_text() for path in logs)

    async def new_user(self) -> dict[str, Any]:
        given = {"email": "user@example.com", "name": "John Doe", "tier": "premium"}
        result = await self.route("user", "create_user", given)
        assert result.status == "completed", result.error
        return dict(result.artifacts[0]["data"])


@pytest.fixture(scope="module")
async def shop(tree: Any, processes: Any, client: Any, shell: Any) -> AsyncIterator[Shop]:
    folder = tree("ecommerce")
    identities = (*map(agent, AGENTS), agent("admin"), CLI)
    settings = StackSettings(DOMAIN, folder / "state", identities, folder / "grants.yaml")
    async with AsyncExitStack() as stack:
        running_stack = await stack.enter_async_context(embedded_stack(settings, settle=False))
        scripts = {folder / f"{name}_agent.py": running_stack.environment(agent(name)) for name in AGENTS}
        running = await stack.enter_async_context(processes(scripts))

        def connect(name: str, identity: SpiffeID) -> Any:
            return client(folder / "config" / f"{name}.yaml", running_stack.environment(identity))

        cli = await stack.enter_async_context(connect("client", CLI))
        await running_stack.settled()
        config = {"AGENTWEAVE_CONFIG": str(folder / "config" / "client.yaml")}

        def types(line: str) -> Any:
            return shell(line, folder, {**running_stack.environment(CLI), **config})

        yield Shop(folder, cli, connect, running, types)


async def test_create_user_through_the_gateway(shop: Shop) -> None:
    user = await shop.new_user()
    assert {key: user[key] for key in ("email", "name", "tier")} == {
        "email": "user@example.com",
        "name": "John Doe",
        "tier": "premium",
    }
    found = await shop.route("user", "get_user", {"user_id": user["user_id"]})
    assert found.artifacts[0]["data"] == user


async def test_create_order_calls_user_inventory_and_payment(shop: Shop) -> None:
    user = await shop.new_user()
    wanted = {
        "user_id": user["user_id"],
        "items": [{"sku": "WIDGET-001", "quantity": 2, "price": "19.99"}],
        "payment_method": "credit_card",
    }
    result = await shop.route("order", "create_order", wanted)
    assert result.status == "completed", result.error
    order = result.artifacts[0]["data"]
    assert (order["total"], order["status"], order["items"]) == ("39.98", "confirmed", wanted["items"])
    assert order["transaction_id"]
    again = await shop.route("order", "get_order", {"order_id": order["order_id"]})
    assert again.artifacts[0]["data"] == order


async def test_the_walk_through_typed_into_a_shell(shop: Shop) -> None:
    created = await shop.types((shop.folder / "create_user.sh").read_text())
    assert created.returncode == 0, created.stderr
    user = json.loads(created.stdout)["artifacts"][0]["data"]
    assert (user["name"], user["tier"]) == ("John Doe", "premium")
    line = (shop.folder / "create_order.sh").read_text()
    ordered = await shop.types(line.replace("<user-id-from-above>", user["user_id"]))
    assert ordered.returncode == 0, ordered.stderr
    result = json.loads(ordered.stdout)
    ((part,),) = (message["parts"] for message in result["messages"])
    assert (result["status"], part["type"], part["data"]["total"]) == ("completed", "data", "39.98")


async def test_pinging_an_agent_is_a_call_like_any_other(shop: Shop) -> None:
    codes: dict[str, int] = {}

    async def ping(target: str) -> None:
        codes[target] = (await shop.types(f"agentweave ping {target}")).returncode

    async with anyio.create_task_group() as group:
        group.start_soon(ping, GATEWAY)
        group.start_soon(ping, USER)
    assert codes == {GATEWAY: 0, USER: 3}


async def test_authz_check_says_why(shop: Shop) -> None:
    line = f"agentweave authz check --caller {CLI} --target {USER} --action get_user --trace"
    checked = await shop.types(line)
    assert checked.returncode == 3, checked.stderr
    assert "gateway.authz has no rule that lets" in checked.stdout + checked.stderr


async def test_what_is_missing_is_a_failed_result(shop: Shop) -> None:
    nobody = {"user_id": "nobody", "items": [], "payment_method": "credit_card"}
    result = await shop.route("order", "create_order", nobody)
    assert (result.status, result.error) == ("failed", "Failed to create order: User not found: nobody")
    many = {**nobody, "user_id": (await shop.new_user())["user_id"]}
    many["items"] = [{"sku": "WIDGET-001", "quantity": 99, "price": "1"}]
    result = await shop.route("order", "create_order", many)
    assert (result.status, result.error) == ("failed", "Failed to create order: Items not available")
    result = await shop.route("shipping", "send", {})
    assert (result.status, result.error) == ("failed", "Service shipping not found")


async def test_only_the_admin_agent_updates_a_tier(shop: Shop) -> None:
    user = await shop.new_user()
    change = {"user_id": user["user_id"], "new_tier": "enterprise"}
    refused = await shop.route("user", "update_tier", change)  # the gateway's policy lets it ask
    assert refused.status == "failed"
    assert refused.error is not None
    assert refused.error.startswith("Service call failed: ")
    assert (await shop.route("user", "get_user", {"user_id": user["user_id"]})).data["tier"] == "premium"
    async with shop.connect("admin", agent("admin")) as admin:
        changed = await admin.call(USER, "update_tier", change)
        assert changed.data == {**user, "tier": "enterprise"}
    assert "only the admin agent may update a tier" in shop.audit("user")


async def test_a_client_may_not_go_around_the_gateway(shop: Shop) -> None:
    with pytest.raises(AuthorizationError) as refused:
        await shop.client.call(USER, "get_user", {"user_id": "x"})
    assert refused.value.direction == "outbound"
    assert "gateway.authz has no rule that lets" in refused.value.reason


async def test_the_gateways_health_asks_every_service(shop: Shop) -> None:
    result = await shop.client.call(GATEWAY, "health", {})
    assert result.status == "completed"
    services = dict.fromkeys(("user", "order", "payment", "inventory"), "healthy")
    assert result.data == {"gateway": "healthy", "services": services}


async def test_the_faqs_metric_names_are_served(shop: Shop) -> None:
    await shop.client.call(GATEWAY, "health", {})

    def scraped(url: str) -> str:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return str(answer.read().decode())

    text = await anyio.to_thread.run_sync(scraped, shop.running["gateway_agent"].metrics_url)
    for name in (
        "agentweave_requests_total{",
        "agentweave_request_duration_seconds_bucket{",
        "agentweave_authz_allowed_total{",
        "agentweave_authz_denied_total",
        "agentweave_svid_rotation_total ",
        "agentweave_svid_rotation_errors_total ",
        "agentweave_opa_requests_total",
        "agentweave_opa_errors_total",
        'agentweave_authz_circuit_breaker_state{state="open"}',
    ):
        assert any(line.startswith(name) for line in text.splitlines()), name


async def test_the_log_has_what_the_snippets_wrote_into_it(shop: Shop) -> None:
    user = await shop.new_user()
    lines = [json.loads(line) for line in shop.running["user_agent"].log.read_text().splitlines()]
    (created,) = [line for line in lines if line.get("user_id") == user["user_id"]]
    assert (created["message"], created["caller"]) == ("User created", GATEWAY)


async def test_every_audit_log_verifies(shop: Shop) -> None:
    await shop.client.call(GATEWAY, "health", {})
    for name in AGENTS:
        assert f"spiffe://{DOMAIN}/agent/{name}" in shop.audit(name)
    report = await anyio.to_thread.run_sync(verify_audit, [shop.folder / "audit"])
    assert report.ok, report.problems
    assert len(report.chains) == len(AGENTS)  # each agent's own; clients keep theirs elsewhere
