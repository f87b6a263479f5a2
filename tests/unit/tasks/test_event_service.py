"""Subscriptions to events through what befalls a worker: grants that come late or go, lost connections, its end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import nats.errors
import pytest

from agentweave_bus import SecureAgent
from agentweave_bus.authz import Grants
from agentweave_bus.bus.connection import Session
from agentweave_bus.runtime.wiring import Connected
from agentweave_bus.testing import MemoryBus, memory_bus
from tests.unit.tasks.event_listeners import Display, Listener, Shipping, let, until

pytestmark = pytest.mark.anyio


class Busy:
    """Keeps a listener's first event in hand for as long as a test wants."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.entered = asyncio.Event()
        self.go_on = asyncio.Event()
        self.ended = False
        listener.then = self._wait

    async def _wait(self) -> None:
        if len(self._listener.heard) == 1:
            self.entered.set()
            await self.go_on.wait()
            self.ended = True


def parts_of(bus: MemoryBus, agent: SecureAgent) -> Connected:
    (held,) = [one for one in bus._held if getattr(one, "agent", None) is agent]
    assert held.parts is not None
    return held.parts


async def some(bus: MemoryBus, seconds: int) -> None:
    for _ in range(seconds):
        await bus.clock.advance(1)


async def test_an_event_in_hand_when_its_worker_stops_goes_to_another_at_once(
    bus: MemoryBus, tmp_path: Path
) -> None:
    file = tmp_path / "shipping.yaml"
    file.write_text("agent: {name: shipping, trust_domain: test.local}\nbus: {drain_timeout: 0.5}\n")
    await let(bus, "client/cli", "agent/shipping", "order.*")
    first, cli = await bus.start(Shipping, config=file), await bus.client()
    busy = Busy(first)
    await cli.publish("order.created", {"order_id": "o-1"})
    await busy.entered.wait()
    second = await bus.start(Shipping, config=file)
    await asyncio.wait_for(bus.stop(first), 30)
    await until(lambda: len(second.heard) == 1)  # no time passes for the broker, which would ask after 30 s
    assert not busy.ended


async def test_what_is_in_hand_ends_before_its_worker_also_when_the_grant_is_gone(bus: MemoryBus) -> None:
    await let(bus, "client/cli", "agent/shipping", "order.*")
    shipping, cli = await bus.start(Shipping), await bus.client()
    busy = Busy(shipping)
    await cli.publish("order.created", {"order_id": "o-1"})
    await busy.entered.wait()
    await bus.set_grants({"grants": []})
    await some(bus, 2)
    stopping = asyncio.ensure_future(bus.stop(shipping))
    await asyncio.sleep(0.2)
    assert not stopping.done()
    busy.go_on.set()
    await asyncio.wait_for(stopping, 30)
    assert busy.ended


async def test_grants_that_change_meanwhile_keep_no_worker_from_ending(bus: MemoryBus) -> None:
    """Neither one that goes nor one that comes, of which nothing is taken any more."""
    for name in ("client/aa", "client/bb"):
        await let(bus, name, "agent/shipping", "order.*")
    shipping = await bus.start(Shipping)
    aa, cc = await bus.client("client/aa"), await bus.client("client/cc")
    busy, parts = Busy(shipping), parts_of(bus, shipping)
    await aa.publish("order.created", {"order_id": "o-1"})
    await busy.entered.wait()
    stopping = asyncio.ensure_future(bus.stop(shipping))
    await asyncio.sleep(0.05)
    grants = bus.grants.model_dump(mode="json")
    del grants["grants"][1]
    await bus.set_grants(grants)
    await let(bus, "client/cc", "agent/shipping", "order.*")
    await parts.authorizer.reload()  # whom the bus has forgotten already
    await some(bus, 5)
    await cc.publish("order.created", {"order_id": "o-2"})
    await some(bus, 5)
    busy.go_on.set()
    await asyncio.wait_for(stopping, 30)
    assert [one.data["order_id"] for one in shipping.heard] == ["o-1"]


async def test_a_grant_of_which_the_broker_learns_after_the_worker_is_heeded_live(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    display, cli = await bus.start(Display), await bus.client()

    async def not_yet() -> None:
        return

    with monkeypatch.context() as patch:
        patch.setattr(bus, "_follow_grants", not_yet)
        await let(bus, "client/cli", "agent/display", "order.*")
        await some(bus, 2)  # the worker looks twice a second
    session = await parts_of(bus, display).keeper.session(1)
    assert session.deaf
    await bus._follow_grants()
    await some(bus, 40)
    assert not session.deaf
    assert session.usable  # it took no other connection
    await cli.publish("order.created", {"order_id": "o-1"})
    await until(lambda: len(display.heard) == 1)


async def test_the_pause_before_another_connection_grows_to_ten_minutes_and_no_further(
    bus: MemoryBus, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = parts_of(bus, await bus.start(Display)).keeper
    session = await keeper.session(1)
    for _ in range(2_000):  # two weeks of them
        keeper._renew_later(session)
    pauses = [int(one.args[0]) for one in caplog.records if "another connection is made" in one.msg]
    assert pauses[:6] == [45, 90, 180, 360, 600, 600]
    assert set(pauses[6:]) == {600}


async def test_a_publisher_that_the_broker_does_not_know_keeps_no_other_from_being_heard(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipping, cli = await bus.start(Shipping), await bus.client("client/zz")
    users = memory_bus.broker_users

    def without_aa(grants: Grants, *more: Any, **options: Any) -> Any:
        kept = tuple(one for one in grants.grants if not any(who.endswith("/aa") for who in one.caller))
        return users(grants.model_copy(update={"grants": kept}), *more, **options)

    monkeypatch.setattr(memory_bus, "broker_users", without_aa)
    await let(bus, "client/aa", "agent/shipping", "order.*")
    await let(bus, "client/zz", "agent/shipping", "order.*")
    await some(bus, 5)
    await cli.publish("order.created", {"order_id": "o-1"})
    await until(lambda: len(shipping.heard) == 1)


async def test_a_connection_that_closes_while_something_is_subscribed_to_ends_no_worker(
    bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    display, cli = await bus.start(Display), await bus.client()
    subscribe, failed = Session._subscribe, asyncio.Event()

    async def once_closed(self: Session, subject: str, *more: Any) -> Any:
        if "aw.event" in subject and not failed.is_set():
            failed.set()
            raise nats.errors.ConnectionClosedError
        return await subscribe(self, subject, *more)

    monkeypatch.setattr(Session, "_subscribe", once_closed)
    await let(bus, "client/cli", "agent/display", "order.*")
    await some(bus, 40)
    assert failed.is_set()
    await cli.publish("order.created", {"order_id": "o-1"})
    await until(lambda: len(display.heard) == 1)
