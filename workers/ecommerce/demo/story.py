"""The demo, scene by scene. Whatever it says is checked first; :class:`DidNotHappenError` ends it."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.embedded.nats_server import find_nats_server
from agentweave_bus.envelope import Kind, decode_payload
from agentweave_bus.identity import IdentitySource
from workers.ecommerce.demo.adversary import (
    Wire,
    altered,
    forged,
    impersonating,
    on_the_wire,
    reply_to,
    stolen_identity,
)
from workers.ecommerce.demo.evidence import AuditTrail, Refusal, handler_runs
from workers.ecommerce.demo.records import check_records
from workers.ecommerce.demo.screen import Check, Screen
from workers.ecommerce.demo.stage import HOSTILE, PRINCIPAL, Stage, open_stage
from workers.ecommerce.directory import GATEWAY, INVENTORY, ORDER, PAYMENT, USER
from workers.ecommerce.payments import Payments
from workers.ecommerce.stock import Stock

__all__ = ["tell"]

SKU: Final = "WIDGET-001"
WEB: Final = "spiffe://agentweave.io/client/web"
must = Check.must


async def tell(screen: Screen, state: Path, grants: Path | None = None) -> None:
    """Run the shop with its state in ``state`` and tell the whole story.

    ``grants`` replaces the shop's own. Raises what went wrong, ``DidNotHappenError`` in most cases.
    """
    screen.title("An order through six agents, and what becomes of those who tamper with it")
    async with open_stage(state, grants) as stage, AsyncExitStack() as block:
        stolen = [
            await block.enter_async_context(stolen_identity(stage.local.stack, victim))
            for victim in (ORDER, PAYMENT, HOSTILE)
        ]
        hostile = await block.enter_async_context(on_the_wire(stage.local.stack, stolen[2]))
        await hostile.listen()
        story = _Story(screen, stage, hostile, *stolen[:2])
        await story.the_shop()
        await story.an_order()
        await story.what_order_may_not()
        await story.on_the_way()
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
        with self.screen.check("a broker that lets nobody in without an SVID") as check:
            version = ".".join(map(str, find_nats_server().version))
            check.came_out(f"nats-server {version}, {local.stack.bus_url}, mutual TLS 1.3")
        with self.screen.check("six agents, a process each, in production") as check:
            pids = [f"{name} {worker.pid}" for name, worker in self.stage.workers.items()]
            must(len({worker.pid for worker in self.stage.workers.values()}) == 6, "not six processes")  # noqa: PLR2004
            check.came_out(f"ready after {local.seconds:.1f} s", f"pid of {', '.join(pids)}")
        with self.screen.check("client/web → gateway: health of all") as check:
            health = (await self.stage.web.call(GATEWAY, "health", {})).data
            must(set(health["services"].values()) == {"healthy"}, f"not all are healthy: {health}")
            check.came_out(f"healthy: {', '.join(['gateway', *health['services']])}")

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
            before = _available()
            order = await self._routed("order", "create_order", self._two_widgets())
            self.order_id = order["order_id"]
            must(order["status"] == "confirmed" and order["total"] == "39.98", f"{order}")
            must(_available() == before - 2 and _charged() == Decimal("39.98"), "not in the books")
            check.came_out(
                f"order {self.order_id} confirmed, 39.98 paid",
                f"order asked user, inventory and payment; widgets in stock: {before} → {_available()}",
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
        check.came_out(
            f"{' → '.join(asked['chain'])}, for {asked['principal']['sub']}",
            "payment took it from the signatures that came along, nothing of it stood in the payload",
        )

    # --- 3

    async def what_order_may_not(self) -> None:
        self.screen.scene("The order agent wants to give Alice a better tier. No grant lets it")
        runs = await self._runs(USER.path, "update_tier")
        with self.screen.check("order asks user for update_tier") as check:
            audit_id = await self._denied_outbound(check)
        with self.screen.check("the same, its own policy left out") as check:
            await self._denied_by_broker(check)
        with self.screen.check("the same, over a broker that lets all pass") as check:
            await self._denied_inbound(check)
        with self.screen.check("did anything happen?") as check:
            tier = (await self._routed("user", "get_user", {"user_id": self.user_id}))["tier"]
            now = await self._runs(USER.path, "update_tier")
            must((tier, now) == ("free", runs), f"tier {tier}, update_tier ran {runs} → {now} times")
            check.came_out(f"no: tier {tier}, update_tier ran {now} times")
        with self.screen.check("client/operator → admin → user: update_tier") as check:
            result = await self.stage.administer(
                "update_tier", {"user_id": self.user_id, "new_tier": "premium"}
            )
            must(result.status == "completed" and result.data["tier"] == "premium", f"{result.error}")
            check.came_out("tier free → premium: the admin agent has the grant")

    async def _denied_outbound(self, check: Check) -> str:
        result = await self.stage.route("order", "upgrade_customer", {"user_id": self.user_id})
        must(result.status == "failed", "order was let: it has changed the tier")
        must(result.data.get("denied") == "outbound", f"not denied by order's own policy: {result.error}")
        audit_id: str = result.data["audit_id"]
        check.came_out(
            "denied by order's own policy; nothing was sent", f"{result.data['reason']}", f"audit {audit_id}"
        )
        return audit_id

    async def _denied_by_broker(self, check: Check) -> None:
        stack = self.stage.local.stack
        call = self._order_asks_for_a_tier()
        async with on_the_wire(stack, self.orders_identity) as wire:
            await wire.send(call.head.sub, call.frame, reply_to(call))
            complaint = await wire.refused_by_broker()
        must(call.head.sub in complaint, f"the broker complained about something else: {complaint}")
        check.came_out(
            "denied by the broker", "order's key, order's connection, a valid signature:", complaint
        )

    async def _denied_inbound(self, check: Check) -> None:
        trail = self._trail("user")
        call = self._order_asks_for_a_tier()
        await self.hostile.send(call.head.sub, call.frame, reply_to(call))
        refusal = await trail.refusal()
        answer = self.hostile.opened(await self.hostile.heard(reply_to(call)))
        told = decode_payload(answer.payload)
        must(refusal.step_name == "authorization", f"refused at {refusal}: {refusal.reason}")
        must(
            answer.head.kind is Kind.REFUSAL and answer.head.re == call.digest and answer.head.iss == USER,
            "the refusal is not user's signed answer to this very call",
        )
        must(isinstance(told, dict) and told["audit_id"] == refusal.audit_id, f"told something else: {told}")
        check.came_out(
            f"denied by user, {refusal}",
            refusal.reason,
            f"the denial is signed by user; audit {refusal.audit_id}",
        )

    def _order_asks_for_a_tier(self) -> Any:
        payload = {"user_id": self.user_id, "new_tier": "premium"}
        return forged(self.orders_identity, USER, "update_tier", payload)

    # --- 4

    async def on_the_way(self) -> None:
        self.screen.scene("The broker turns bad: it reads every message and sends what it likes")
        subject = call_subject(PAYMENT, "process_payment")
        real = await self.hostile.heard(subject)
        with self.screen.check("order's request to payment, one byte altered") as check:
            frame = altered(real.data, "39.98", "99.98")
            check.lines.append("39.98 became 99.98 under order's genuine signature")
            await self._attack(check, PAYMENT.path, "process_payment", subject, frame, real.reply)
        with self.screen.check("the genuine request, once more") as check:
            await self._attack(check, PAYMENT.path, "process_payment", subject, real.data, real.reply)
        await self.stage.restart("payment")
        with self.screen.check("once more, to payment killed and started anew") as check:
            check.lines.append(
                f"pid {self.stage.workers['payment'].pid} has never seen it; the id is claimed for all replicas"
            )
            await self._attack(check, PAYMENT.path, "process_payment", subject, real.data, real.reply)
        with self.screen.check("payment signs in order's name") as check:
            call = impersonating(
                self.payments_identity, ORDER, INVENTORY, "release_items", {"order_id": self.order_id}
            )
            check.lines.append(
                "a call of release_items to inventory, which order may make and payment may not"
            )
            await self._attack(
                check, INVENTORY.path, "release_items", call.head.sub, call.frame, reply_to(call)
            )
        with self.screen.check("and the honest ones are still served") as check:
            order = await self._routed("order", "create_order", self._two_widgets())
            must(_charged() == Decimal("79.96"), f"charged {_charged()}")
            check.came_out(f"order {order['order_id']} confirmed, 39.98 paid")

    async def _attack(  # noqa: PLR0917 - whom, what, and the message
        self, check: Check, path: str, capability: str, subject: str, frame: bytes, reply: str
    ) -> None:
        """Send a frame as the hostile broker; it must be refused, and nothing may have happened."""
        agent = path.rpartition("/")[2]
        trail, before = self._trail(agent), (await self._runs(path, capability), _charged(), _available())
        await self.hostile.send(subject, frame, reply)
        refusal = await trail.refusal()
        after = (await self._runs(path, capability), _charged(), _available())
        must(after == before, f"it had an effect: {before} became {after}")
        _must_be_no_matter_of_rights(refusal)
        check.came_out(
            f"refused by {agent}, {refusal}",
            refusal.reason,
            f"{capability} ran {after[0]} times before and after; 39.98 charged, {after[2]} widgets;"
            f" audit {refusal.audit_id}",
        )

    # ---

    async def _routed(self, service: str, action: str, payload: dict[str, Any]) -> Any:
        result = await self.stage.route(service, action, payload)
        must(result.status == "completed", f"{action} failed: {result.error}")
        return result.data

    async def _runs(self, path: str, capability: str) -> int:
        worker = self.stage.workers[path.rpartition("/")[2]]
        return await handler_runs(worker.metrics_url, capability)

    def _trail(self, agent: str) -> AuditTrail:
        return AuditTrail(self.stage.audit, agent)


def _must_be_no_matter_of_rights(refusal: Refusal) -> None:
    must(refusal.step < 10, f"it came as far as {refusal}: {refusal.reason}")  # noqa: PLR2004 - 10: payload, 11: policy


def _charged() -> Decimal:
    return Payments().charged()


def _available() -> int:
    return next(int(article["available"]) for article in Stock().articles() if article["sku"] == SKU)
