"""The demo, scene by scene. Whatever it says is checked first; :class:`DidNotHappenError` ends it."""

from __future__ import annotations

from argparse import Namespace
from contextlib import AsyncExitStack
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import anyio

from agentweave_bus import SpiffeID
from agentweave_bus.authz.audit_reading import log_files, matching
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.cli.why import explain
from agentweave_bus.embedded.nats_server import find_nats_server
from agentweave_bus.envelope import Kind, decode_payload
from agentweave_bus.identity import IdentitySource
from workers.ecommerce.demo.adversary import (
    Message,
    Wire,
    on_the_wire,
    refused_without_svid,
    sealed_by,
    stolen_identity,
)
from workers.ecommerce.demo.durable import DurableOrders
from workers.ecommerce.demo.evidence import SKU, AuditTrail, available, charged, handler_runs
from workers.ecommerce.demo.page import ConsolePage
from workers.ecommerce.demo.records import check_records
from workers.ecommerce.demo.screen import Check, Exact, Screen
from workers.ecommerce.demo.stage import HOSTILE, PRINCIPAL, Stage, open_stage
from workers.ecommerce.directory import GATEWAY, INVENTORY, ORDER, PAYMENT, USER

__all__ = ["tell"]

ORDER_ASKS: Final = (
    (USER, "get_user"),
    (INVENTORY, "check_availability"),
    (PAYMENT, "process_payment"),
    (INVENTORY, "reserve_items"),
)
WEB: Final = "spiffe://agentweave.io/client/web"
must = Check.must


async def tell(screen: Screen, state: Path, grants: Path | None = None, *, hold: bool = False) -> None:
    """Run the shop with its state in ``state`` and tell the whole story.

    ``grants`` replaces the shop's own. With ``hold`` the shop stays open before its end, until this is
    cancelled. Raises what went wrong, ``DidNotHappenError`` in most cases.
    """
    screen.title("An order through six agents, and what becomes of those who tamper with it")
    async with open_stage(state, grants) as stage, AsyncExitStack() as block:
        orders, payments, broker = [
            await block.enter_async_context(stolen_identity(stage.local.stack, victim))
            for victim in (ORDER, PAYMENT, HOSTILE)
        ]
        hostile = await block.enter_async_context(on_the_wire(stage.local.stack, broker))
        await hostile.listen()
        story = _Story(screen, stage, hostile, orders, payments)
        await story.the_shop()
        await story.an_order()
        await story.what_order_may_not()
        await story.on_the_way()
        await story.durable_orders()
        await story.the_page()
        if hold:
            await story.held()
        authority = stage.local.stack.api.authority.bundle
    screen.scene("What is on record, after all processes have ended")
    check_records(screen, state / "audit", authority)


@dataclass(slots=True)
class _Story:
    screen: Screen
    stage: Stage
    hostile: Wire
    """The connection of a broker gone bad: it hears everything and may send anything."""
    orders_identity: IdentitySource
    payments_identity: IdentitySource
    user_id: str = ""
    order_id: str = ""

    # --- 1

    async def the_shop(self) -> None:
        local = self.stage.local
        self.screen.scene("The shop")
        with self.screen.check("six agents, a process each, in production") as check:
            pids = [f"{name} {worker.pid}" for name, worker in self.stage.workers.items()]
            must(len({worker.pid for worker in self.stage.workers.values()}) == 6, "not six processes")  # noqa: PLR2004
            check.came_out(f"ready after {local.seconds:.1f} s", f"pid of {', '.join(pids)}")
        version = ".".join(map(str, find_nats_server().version))
        with self.screen.check(f"TLS to nats-server {version} without an SVID") as check:
            alert = await refused_without_svid(local.stack.nats.port)
            check.came_out("refused by the broker", f"tls://127.0.0.1:{local.stack.nats.port}: {alert}")
        with self.screen.check("client/web → gateway: health of all") as check:
            health = (await self.stage.web.call(GATEWAY, "health", {})).data
            must(set(health["services"].values()) == {"healthy"}, f"not all are healthy: {health}")
            check.came_out(f"healthy: {', '.join(['gateway', *health['services']])}")
        self.screen.line(f"The console, while this runs: {self.stage.console.url}")

    # --- 2

    async def an_order(self) -> None:
        self.screen.scene(f"Alice orders two widgets (principal {PRINCIPAL['sub']} of {PRINCIPAL['iss']})")
        with self.screen.check("client/web → gateway → user: create_user") as check:
            user = await self._routed(
                "user", "create_user", {"email": "alice@shop.example", "name": "Alice", "tier": "free"}
            )
            self.user_id = user["user_id"]
            check.came_out(f"user {self.user_id}, tier {user['tier']}")
        with self.screen.check("client/web → gateway → order: create_order") as check:
            before = available()
            order = await self._routed("order", "create_order", self._two_widgets())
            self.order_id = order["order_id"]
            must(order["status"] == "confirmed" and order["total"] == "39.98", f"{order}")
            for agent, capability in ORDER_ASKS:
                await self.hostile.heard(call_subject(agent, capability))
            must(available() == before - 2 and charged() == Decimal("39.98"), "not in the books")
            check.came_out(
                f"order {self.order_id} confirmed, 39.98 paid",
                f"order asked user, inventory and payment; widgets in stock: {before} → {available()}",
            )
        with self.screen.check("on whose behalf was payment asked?") as check:
            await self._on_whose_behalf(check)

    def _two_widgets(self) -> dict[str, Any]:
        items = [{"sku": SKU, "quantity": 2, "price": "19.99"}]
        return {"user_id": self.user_id, "items": items, "payment_method": "credit_card"}

    async def _on_whose_behalf(self, check: Check) -> None:
        payment = await self._routed("payment", "get_payment", {"order_id": self.order_id})
        asked = payment["asked_by"]
        must(asked["chain"] == [WEB, GATEWAY, ORDER] and asked["origin"] == WEB, f"{asked}")
        must(asked["principal"] == PRINCIPAL, f"{asked}")
        request = await self.hostile.heard(call_subject(PAYMENT, "process_payment"))
        said = [name.encode() for name in (PRINCIPAL["sub"], WEB, GATEWAY, ORDER)]
        must(not any(name in request.payload for name in said), "the payload names somebody")
        check.came_out(
            f"{' → '.join(asked['chain'])}, for {asked['principal']['sub']}",
            "payment took it from the signatures that came along, nothing of it stood in the payload",
        )

    # --- 3

    async def what_order_may_not(self) -> None:
        self.screen.scene("The order agent wants to give Alice a better tier. No grant lets it")
        runs = await self._runs(USER, "update_tier")
        with self.screen.check("order asks user for update_tier") as check:
            audit_id = await self._denied_outbound(check)
        with self.screen.check(f"agentweave why {audit_id}") as check:
            self._why(check, audit_id)
        with self.screen.check("order asks, its own policy left out") as check:
            await self._denied_by_broker(check)
        with self.screen.check("order asks, over a broker that lets all pass") as check:
            await self._denied_inbound(check)
        with self.screen.check("client/operator → admin → user: update_tier") as check:
            tier = (await self._routed("user", "get_user", {"user_id": self.user_id}))["tier"]
            now = await self._runs(USER, "update_tier")
            must((tier, now) == ("free", runs), f"tier {tier}, update_tier ran {runs} → {now} times")
            await self._admin_may(check)

    async def _denied_outbound(self, check: Check) -> str:
        result = await self.stage.route("order", "upgrade_customer", {"user_id": self.user_id})
        must(result.status == "failed", "order was let: it has changed the tier")
        facts = result.data or {}
        must(facts.get("denied") == "outbound", f"not denied by order's own policy: {result.error}")
        sent = await self.hostile.has_heard(call_subject(USER, "update_tier"))
        must(not sent, "order's request was on the wire all the same")
        audit_id: str = facts["audit_id"]
        check.came_out(
            "denied by order's own policy, nothing was sent", f"{facts['reason']}; audit {audit_id}"
        )
        return audit_id

    def _why(self, check: Check, audit_id: str) -> None:
        """Explain a refusal with the very function that the command line uses."""
        records = matching(log_files([self.stage.audit]), audit_id.__eq__, ["audit_id"])
        story = explain(records, Namespace(policy=str(self.stage.grants), policy_path=None))
        must(story["verdict"] == "denied" and "would_allow" in story, f"{story}")
        entry = [Exact(line) for line in story["would_allow"].splitlines()[1:]]
        check.came_out("no grant is about this; this one would allow it:", *entry)

    async def _denied_by_broker(self, check: Check) -> None:
        call = self._order_asks_for_a_tier()
        async with on_the_wire(self.stage.local.stack, self.orders_identity) as wire:
            await wire.send(call.subject, call.frame, call.reply)
            complaint = await wire.refused_by_broker()
        must(call.subject in complaint, f"the broker complained about something else: {complaint}")
        check.came_out("denied by the broker", complaint.removeprefix("nats: "))

    async def _denied_inbound(self, check: Check) -> None:
        trail, call = self._trail(USER), self._order_asks_for_a_tier()
        await self.hostile.send(call.subject, call.frame, call.reply)
        refusal = await trail.refusal()
        answer = self.hostile.opened(await self.hostile.heard(call.reply))
        told = decode_payload(answer.payload)
        must(refusal.step_name == "authorization", f"refused at {refusal}: {refusal.reason}")
        must(answer.head.kind is Kind.REFUSAL and answer.head.iss == USER, "user has not signed a refusal")
        must(answer.head.re == call.digest, "the refusal is not about this very call")
        must(isinstance(told, dict) and told["audit_id"] == refusal.audit_id, f"told something else: {told}")
        check.came_out(
            f"denied by user, {refusal}", f"{refusal.reason}; signed by user; audit {refusal.audit_id}"
        )

    async def _admin_may(self, check: Check) -> None:
        change = {"user_id": self.user_id, "new_tier": "premium"}
        result = await self.stage.administer("update_tier", change)
        must(result.status == "completed" and result.data["tier"] == "premium", f"{result.error}")
        must(await self._runs(USER, "update_tier") == 1, "update_tier has not run exactly once")
        check.came_out(
            "allowed: tier free → premium", "update_tier of user had run 0 times until here, and now once"
        )

    def _order_asks_for_a_tier(self) -> Message:
        change = {"user_id": self.user_id, "new_tier": "premium"}
        return sealed_by(self.orders_identity, USER, "update_tier", change)

    # --- 4

    async def on_the_way(self) -> None:
        self.screen.scene("The broker turns bad: it reads every message and sends what it likes")
        real = await self.hostile.heard(call_subject(PAYMENT, "process_payment"))
        payment = _Target(PAYMENT, "process_payment")
        with self.screen.check("order's request to payment, one byte altered") as check:
            await self._attack(
                check,
                payment,
                real.altered("39.98", "99.98"),
                steps=("proof",),
                because="the payload is not the one",
                about="39.98 is now 99.98: ",
            )
        with self.screen.check("order's genuine request, a second time") as check:
            await self._attack(check, payment, real, steps=("replay",), because="was admitted before")
        await self.stage.restart("payment")
        with self.screen.check("a third time, to payment killed and started anew") as check:
            await self._attack(
                check,
                payment,
                real,
                steps=("replay",),
                because="claimed already",
                about=f"process {self.stage.workers['payment'].pid} never saw it, but: ",
            )
        with self.screen.check("a request signed by payment in order's name") as check:
            await self._attack(
                check,
                _Target(INVENTORY, "release_items"),
                sealed_by(
                    self.payments_identity,
                    INVENTORY,
                    "release_items",
                    {"order_id": self.order_id},
                    in_the_name_of=ORDER,
                ),
                steps=("proof",),
                because="in the name of",
                about="it asks for release_items, which order may: ",
            )
        with self.screen.check("honest requests over the same broker") as check:
            await self._served(check)

    async def _attack(
        self,
        check: Check,
        target: _Target,
        message: Message,
        *,
        steps: tuple[str, ...],
        because: str,
        about: str = "",
    ) -> None:
        """Send a message as the hostile broker: it must be refused as expected, and change nothing."""
        trail, before = self._trail(target.agent), await self._state(target)
        await self.hostile.send(message.subject, message.frame, message.reply)
        refusal = await trail.refusal()
        after = await self._state(target)
        must(after == before, f"it had an effect: {before} became {after}")
        must(refusal.step_name in steps and because in refusal.reason, f"{refusal}: {refusal.reason}")
        check.came_out(
            f"refused by {target.agent}, {refusal}",
            f"{about}{refusal.reason}; audit {refusal.audit_id}",
            f"{target.capability} ran {before[0]} → {after[0]} times,"
            f" charged {before[1]} → {after[1]}, widgets {before[2]} → {after[2]}",
        )

    async def _served(self, check: Check) -> None:
        before = charged()
        order = await self._routed("order", "create_order", self._two_widgets())
        must(charged() == before + Decimal("39.98"), f"charged {before} → {charged()}")
        check.came_out(f"order {order['order_id']} confirmed, charged {before} → {charged()}")

    # --- 5

    async def durable_orders(self) -> None:
        self.screen.scene("Orders as durable tasks: stored before anybody works on them")
        orders = DurableOrders(self.stage, self.hostile, self._two_widgets())
        with self.screen.check("client/web submits an order; the card has expired") as check:
            await orders.declined(check)
        with self.screen.check("another one; order is killed once it is paid") as check:
            await orders.killed_once_paid(check)
        with self.screen.check("the broker puts another order's outcome there") as check:
            await orders.outcome_copied(check)
        with self.screen.check("the order whose agent was killed after paying") as check:
            await orders.carried_on(check)

    # --- 6

    async def the_page(self) -> None:
        self.screen.scene("The console: a page for whoever looks after the shop, as client/operator")
        page = ConsolePage(self.stage.console)
        with self.screen.check("its address opens the console") as check:
            await page.opened_once(check)
        with self.screen.check("what the console shows") as check:
            await page.shows(check, tasks={"completed": 1, "failed": 1}, agents=len(self.stage.workers))

    async def held(self) -> None:
        self.screen.line(f"The shop stays open until Ctrl-C. Its console: {self.stage.console.url}")
        await anyio.sleep_forever()

    # --- what the scenes share

    async def _routed(self, service: str, action: str, payload: dict[str, Any]) -> Any:
        result = await self.stage.route(service, action, payload)
        must(result.status == "completed", f"{action} failed: {result.error}")
        return result.data

    async def _state(self, target: _Target) -> tuple[int, Decimal, int]:
        """Return how often the target's handler has run, what is charged, and the widgets in stock."""
        return await self._runs(target.agent, target.capability), charged(), available()

    async def _runs(self, agent: SpiffeID, capability: str) -> int:
        return await handler_runs(self.stage.workers[_name(agent)].metrics_url, capability)

    def _trail(self, agent: SpiffeID) -> AuditTrail:
        return AuditTrail(self.stage.audit, _name(agent))


@dataclass(frozen=True, slots=True)
class _Target:
    agent: SpiffeID
    capability: str


def _name(agent: SpiffeID) -> str:
    return agent.path.rpartition("/")[2]
