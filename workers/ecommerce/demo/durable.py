"""Orders as durable tasks: one that is declined, and one whose worker dies between paying and confirming."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, Final

from agentweave_bus import SpiffeID, TaskHandle
from agentweave_bus.bus.subjects import step_subject
from agentweave_bus.envelope import decode_payload
from agentweave_bus.tasks.record import TaskRef
from agentweave_bus.types import TaskState
from workers.ecommerce.database import data_directory
from workers.ecommerce.demo.adversary import Message, Wire
from workers.ecommerce.demo.evidence import available, charged, handler_runs, orders_of
from workers.ecommerce.demo.screen import Check, DidNotHappenError
from workers.ecommerce.demo.stage import MISSED_AFTER_S, PRINCIPAL, Stage
from workers.ecommerce.directory import ORDER, TRUST_DOMAIN

__all__ = ["DurableOrders", "held", "killed_once_paid", "until"]

must = Check.must

KEY: Final = "cart-17"
_WEB: Final = SpiffeID.of(TRUST_DOMAIN, "client", "web")
_SECONDS: Final = 30.0
_ACKNOWLEDGED: Final = "demo.stored"


@contextmanager
def held(database: str) -> Iterator[None]:
    """Let nobody write to one of the agents' databases: whoever wants to, waits for up to five seconds."""
    path = data_directory() / f"{database}.db"
    with closing(sqlite3.connect(path, timeout=5.0, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            connection.execute("ROLLBACK")


async def until(holds: Callable[[], bool], otherwise: str) -> None:
    """Wait until something holds that another process brings about.

    Raises:
        DidNotHappenError: it does not within 15 seconds.

    """
    give_up = time.monotonic() + _SECONDS
    while not holds():
        must(time.monotonic() < give_up, otherwise)
        await asyncio.sleep(0.005)


async def killed_once_paid(stage: Stage, wanted: dict[str, Any], key: str) -> TaskHandle:
    """Submit an order and kill the order agent when it is paid: on record, and nothing behind it.

    The moment is caught by holding the databases: payment's until the goods are reserved, order's from then
    on, so that it can't confirm.
    """
    before = available()
    with ExitStack() as orders:
        with held("payments"):
            handle = await stage.web.submit(
                ORDER, "create_order", wanted, idempotency_key=key, principal=PRINCIPAL
            )
            await until(lambda: available() < before, "nothing was reserved")
            orders.enter_context(held("orders"))
        async with asyncio.timeout(_SECONDS):
            async for event in handle.events():
                if event.kind == "progress" and event.message == "it is paid":
                    break
        await stage.kill("order")
    return handle


class DurableOrders:
    """What is tried, one after the other."""

    def __init__(self, stage: Stage, hostile: Wire, wanted: dict[str, Any]) -> None:
        self._stage = stage
        self._hostile = hostile
        self._wanted = wanted
        self._outcome: Message | None = None
        self._handle: TaskHandle | None = None

    async def declined(self, check: Check) -> None:
        """Submit an order that can't be paid: the goods are reserved, and released again."""
        before = (available(), charged())
        released = await self._runs("inventory", "release_items")
        handle = await self._submit({**self._wanted, "payment_method": "expired_card"}, "cart-16")
        result = await handle.result(_SECONDS)
        must(result.status == "failed" and "declined" in str(result.error), f"{result}")
        must((available(), charged()) == before, "something of it is left")
        must(await self._runs("inventory", "release_items") > released, "nothing was released")
        self._outcome = (await self._records(handle))[-1]
        check.came_out(
            "failed, and undone: the goods are released",
            f"{result.error}; widgets {before[0]} → {available()}, charged {before[1]} → {charged()}",
        )

    async def killed_once_paid(self, check: Check) -> None:
        """Submit an order and kill the agent behind the payment."""
        before, pid = charged(), self._stage.workers["order"].pid
        self._handle = await killed_once_paid(self._stage, self._wanted, KEY)
        key = _ref(self._handle).key
        must(
            await self._hostile.has_heard(step_subject(ORDER, key, "charge 0")), "the charge is not on record"
        )
        must(not await self._hostile.has_heard(step_subject(ORDER, key, "confirm 0")), "it was confirmed")
        must(orders_of(self._wanted["user_id"])[0] == "pending", "it was confirmed")
        check.came_out(
            "paid, not confirmed, and its process is gone",
            f"process {pid}; charged {before} → {charged()}; on record: the steps up to the charge, signed",
        )

    async def outcome_copied(self, check: Check) -> None:
        """Put the other order's genuine record into this task's log, in the next slot."""
        handle, outcome = self._killed, self._outcome
        must(outcome is not None, "there is no outcome to copy")
        assert outcome is not None
        subject = _ref(handle).subject(len(await self._records(handle)))
        await self._hostile.send(subject, outcome.frame, _ACKNOWLEDGED)
        stored = json.loads((await self._hostile.heard(_ACKNOWLEDGED)).frame)
        must("error" not in stored, f"the broker refused: {stored}")
        status = await handle.status()
        must(status.state is TaskState.WORKING, f"it was believed: {status}")
        said = decode_payload(outcome.payload)
        check.came_out(
            "believed by nobody: the task is still at work",
            f"a genuine record, signed by order, that says {said['state']!r}: but of another task",
        )

    async def carried_on(self, check: Check) -> None:
        """Start the agent anew: the order is confirmed once and charged once, whoever asks again."""
        handle, before = self._killed, charged()
        paid = await self._runs("payment", "process_payment")
        await self._stage.restart("order")
        order = (await handle.result(_SECONDS)).data
        again = await (await self._submit(self._wanted, KEY)).result(_SECONDS)
        status, records = await handle.status(), await self._records(handle)
        must(order["status"] == "confirmed" and again.data == order, f"{order}, and then {again}")
        must(status.state is TaskState.COMPLETED and status.attempt > 1, f"{status}")
        must(charged() == before, f"charged {before} → {charged()}")
        must(await self._runs("payment", "process_payment") == paid, "process_payment has run again")
        must(orders_of(self._wanted["user_id"])[0] == "confirmed", "it is not in the books")
        states = [decode_payload(self._hostile.opened(one).payload)["state"] for one in records]
        must(states.count("completed") == 1 and states[-1] == "completed", f"not one outcome: {states}")
        check.came_out(
            f"order {order['order_id']} confirmed at attempt {status.attempt}, charged once",
            f"charged {before} → {charged()}; missed after {MISSED_AFTER_S} s (by default 30);"
            f" submitted again as {KEY}: the same order",
        )

    async def _on_record(self, step: str) -> bool:
        slot = step_subject(ORDER, _ref(self._killed).key, f"{step} 0")  # the first of those that it may have
        return await self._hostile.has_heard(slot)

    async def _records(self, handle: TaskHandle) -> list[Message]:
        """Return what stands in the slots of a task's log, whoever wrote it."""
        records: list[Message] = []
        while await self._hostile.has_heard(subject := _ref(handle).subject(len(records))):
            records.append(await self._hostile.heard(subject))
        return records

    @property
    def _killed(self) -> TaskHandle:
        if self._handle is None:
            raise DidNotHappenError("there is no task whose worker was killed")
        return self._handle

    async def _submit(self, wanted: dict[str, Any], key: str) -> TaskHandle:
        return await self._stage.web.submit(
            ORDER, "create_order", wanted, idempotency_key=key, principal=PRINCIPAL
        )

    async def _runs(self, name: str, capability: str) -> int:
        return await handler_runs(self._stage.workers[name].metrics_url, capability)


def _ref(handle: TaskHandle) -> TaskRef:
    return TaskRef(ORDER, _WEB, handle.capability, handle.id)
