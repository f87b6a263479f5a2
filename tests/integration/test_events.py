"""Events on a real broker: groups and replicas, order, workers that die, grants that change."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus import SyncAgentWeaveClient
from agentweave_bus.bus import streams
from agentweave_bus.cli import main
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.embedded.durable_bus import DurableBus
from agentweave_bus.exceptions import AuthorizationError
from tests.integration.event_agents import HANG, Ledger, Screen, Shipping, StuckShipping, Warehouse

pytestmark = pytest.mark.anyio

PATIENCE = 30.0
GRANTED = [
    ("shop", "shipping", "order.created"),
    ("shop", "warehouse", "*"),
    ("shop", "screen", "order.*"),
    ("shop", "stuck-shipping", "order.*"),
    ("teller", "ledger", "order.*"),
    ("changing", "follower", "order.created", "order.paid"),
    ("script", "heard-of", "order.*"),
]


@pytest.fixture(scope="module")
async def shared(anyio_backend: str) -> AsyncIterator[DurableBus]:
    """One broker for all of these tests; each has agents of its own names."""
    with pytest.MonkeyPatch.context() as patch:
        # A worker that dies without a word is missed after this long, in seconds.
        patch.setattr(streams, "TASK_ACK_WAIT_S", 2)
        bus = DurableBus()
        for publisher, subscriber, *names in GRANTED:  # before it opens, so that everybody is there at once
            await bus.grant(f"client/{publisher}", f"agent/{subscriber}", *names, kinds=["event"])
        async with bus:
            yield bus


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not check():  # noqa: ASYNC110 - there is no event
            await asyncio.sleep(0.005)


def ids(*agents: Any) -> list[str]:
    return sorted(data["order_id"] for agent in agents for _, data, _ in agent.heard)


async def test_two_groups_of_replicas_and_a_screen(shared: DurableBus) -> None:
    """Each group handles each event once; what is live reaches every replica."""
    shipping = [await shared.start(Shipping), await shared.start(Shipping)]
    warehouse = await shared.start(Warehouse)
    screens = [await shared.start(Screen), await shared.start(Screen)]
    shop = await shared.client("client/shop")
    await asyncio.gather(*(shop.publish("order.created", {"order_id": f"o-{n:02}"}) for n in range(40)))
    await shop.publish("order.paid", {"order_id": "paid"})
    wanted = [f"o-{n:02}" for n in range(40)]
    await until(lambda: len(warehouse.heard) == 41 and len(ids(*shipping)) == 40)
    await until(lambda: all(len(one.heard) == 41 for one in screens))
    assert ids(*shipping) == wanted
    assert ids(warehouse) == ids(screens[0]) == ids(screens[1]) == [*wanted, "paid"]
    assert {attempt for one in (*shipping, warehouse) for _, _, attempt in one.heard} == {1}


@pytest.mark.slow
async def test_a_worker_that_dies_in_the_middle_is_taken_over_from(
    shared: DurableBus, tmp_path: Path
) -> None:
    file = tmp_path / "begun"
    worker = await shared.start_worker(StuckShipping)
    shop = await shared.client("client/shop")
    await shop.publish("order.created", {"order_id": HANG, "file": str(file)})
    await until(file.exists)
    await shared.kill_worker(worker)
    await shop.publish("order.created", {"order_id": "o-1", "file": str(file)})
    await shared.start(StuckShipping)
    await until(lambda: len(file.read_text().splitlines()) == 3)
    begun = [line.split() for line in file.read_text().splitlines()]
    assert begun[0] == [str(worker.pid), HANG, "1"]
    assert sorted(line[1:] for line in begun[1:]) == [[HANG, "2"], ["o-1", "1"]]


async def test_an_ordered_subscription_waits_for_what_is_tried_again(shared: DurableBus) -> None:
    ledgers = [await shared.start(Ledger), await shared.start(Ledger)]
    course: list[tuple[int, int]] = []
    for one in ledgers:
        one.note = lambda one=one, **data: course.append((data["number"], one.context.attempt))  # type: ignore[method-assign]
    teller = await shared.client("client/teller")
    for number in range(6):
        await teller.publish("order.moved", {"number": number}, key="o-1")
    await until(lambda: len(course) == 7)
    assert course == [(0, 1), (1, 1), (1, 2), (2, 1), (3, 1), (4, 1), (5, 1)]


@pytest.mark.slow
async def test_grants_that_change_change_what_is_given_out(shared: DurableBus) -> None:
    follower = await shared.start(Shipping, name="follower")
    changing = await shared.client("client/changing")
    await changing.publish("order.created", {"order_id": "first"})
    await until(lambda: ids(follower) == ["first"])
    grants = shared.grants.model_dump(mode="json")
    mine = next(one for one in grants["grants"] if one["callee"][0].endswith("/follower"))
    mine["capabilities"] = ["order.paid"]
    await shared.set_grants(grants)
    with pytest.raises(AuthorizationError):
        await changing.publish("order.created", {"order_id": "second"})
    await changing.publish("order.paid", {"order_id": "third"})
    await until(lambda: ids(follower) == ["first", "third"])
    mine["capabilities"] = ["order.*"]
    await shared.set_grants(grants)
    async with asyncio.timeout(PATIENCE):
        while "fourth" not in ids(follower):
            await changing.publish("order.packed", {"order_id": "fourth"})  # until the consumer is for it
            await asyncio.sleep(0.2)


@pytest.mark.slow
async def test_a_script_and_the_command_line_publish(
    shared: DurableBus, capsys: pytest.CaptureFixture[str]
) -> None:
    listener = await shared.start(Shipping, name="heard-of")
    config = shared._config(None, identity=shared.id("client/script"))
    await shared._enter(config.agent.spiffe_id)

    def script() -> str:
        with SyncAgentWeaveClient(config) as client:
            return client.publish("order.created", {"order_id": "o-1"}).id

    published = await asyncio.to_thread(script)
    await until(lambda: ids(listener) == ["o-1"])
    (admission,) = shared.audit(listener, event="admission")
    assert admission["id"] == published
    file = str(shared._written(config, 0))
    data = '{"order_id": "o-2"}'
    words = ["publish", "order.created", "--data", data, "--key", "k", "--json", "--config", file]
    assert await asyncio.to_thread(main, words) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["name"] == "order.created"
    await until(lambda: ids(listener) == ["o-1", "o-2"])
    assert await asyncio.to_thread(main, ["publish", "invoice.paid", "--config", file]) == ExitCode.DENIED
    assert await asyncio.to_thread(main, ["publish", "Invoice", "--config", file]) != ExitCode.DONE
    assert "no event's name" in capsys.readouterr().err
