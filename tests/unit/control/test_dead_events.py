"""Operators and dead events: what they see of one, and that nobody can redrive it."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import pytest

from agentweave_bus import TaskFailedError
from agentweave_bus.cli import dlq as command
from agentweave_bus.cli import main
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.exceptions import AgentCallError, ConfigurationError
from agentweave_bus.runtime import AgentWeaveClient
from agentweave_bus.runtime.operators import DeadLetterCalls
from agentweave_bus.testing import MemoryBus
from tests.unit.tasks.event_listeners import Counting, Listener, Shipping, dead, let, until

pytestmark = pytest.mark.anyio


class Ward(NamedTuple):
    bus: MemoryBus
    cli: AgentWeaveClient
    operator: DeadLetterCalls

    async def given_up(self, listener: Listener, *, data: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Have an event given up; return its row in the list."""
        before = len(dead(self.bus, listener))
        await self.cli.publish("order.created", data, **more)
        await until(lambda: len(dead(self.bus, listener)) == before + 2)
        return (await self.letters())[-1]

    async def letters(self, **options: Any) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = (await self.operator.list(**options))["letters"]
        return listed


@pytest.fixture
async def ward(bus: MemoryBus) -> Ward:
    for name in ("shipping", "counting"):
        await let(bus, "client/cli", f"agent/{name}", "order.*")
    operators = [{"who": str(bus.id("client/operator")), "may": ["control:redrive"]}]
    await bus.set_grants({**bus.grants.model_dump(mode="json", exclude_none=True), "operators": operators})
    cli = await bus.client("client/cli")
    await bus.client("client/operator")
    parts = bus._held[-1].parts
    assert parts is not None
    return Ward(bus, cli, DeadLetterCalls(parts))


async def failing(bus: MemoryBus) -> Counting:
    counting = await bus.start(Counting)

    async def fail() -> None:
        raise TaskFailedError("no such order")

    counting.then = fail
    return counting


async def test_a_dead_event_is_verified_and_told(ward: Ward) -> None:
    counting = await failing(ward.bus)
    row = await ward.given_up(counting, data={"order_id": "o-1"}, key="o-1")
    assert row["state"] == "event"
    assert "no such order" in row["reason"]
    assert row["attempts"] == 1
    event = row["event"]
    assert (event["publisher"], event["name"], event["key"]) == (
        str(ward.bus.id("client/cli")),
        "order.created",
        "o-1",
    )
    assert row["letter"].startswith(f"{counting.spiffe_id}#created/")
    shown = await ward.operator.show(row["letter"])
    assert shown["event"] == event
    assert "payload" not in shown
    (published,) = ward.bus.audit("client/cli", event="publish")
    assert (event["id"], shown["signed"]["digest"]) == (published["id"], published["digest"])
    assert (await ward.operator.show(row["letter"], payload=True))["payload"] == {"order_id": "o-1"}


async def test_it_tells_how_often_the_handler_ran(ward: Ward) -> None:
    shipping = await ward.bus.start(Shipping)
    row = await ward.given_up(shipping, data={"nonsense": True})
    assert row["attempts"] == 0  # its data never fitted


async def test_it_is_not_redriven_and_what_to_do_is_said(ward: Ward) -> None:
    counting = await failing(ward.bus)
    row = await ward.given_up(counting, data={"order_id": "o-1"})
    with pytest.raises(ConfigurationError, match="a dead event can't be redriven") as told:
        await ward.operator.redrive(row["letter"])
    assert "for all who hear it. What it held: agentweave dlq show" in str(told.value)  # two sentences
    assert "agentweave publish order.created" in str(told.value)
    assert "a dead event can't be redriven" in (await ward.operator.show(row["letter"]))["not_redrivable"]
    assert [one.data for one in counting.heard] == [{"order_id": "o-1"}]


async def test_published_again_it_is_handled_and_the_dead_one_dropped(ward: Ward) -> None:
    counting = await failing(ward.bus)
    row = await ward.given_up(counting, data={"order_id": "o-1"}, key="k")
    counting.then = None
    held = await ward.operator.show(row["letter"], payload=True)
    await ward.cli.publish(held["event"]["name"], held["payload"], key=held["event"]["key"])
    await until(lambda: len(counting.heard) == 2)
    assert counting.heard[0] == counting.heard[1]
    await ward.operator.drop(row["letter"], reason="published again")
    assert await ward.letters() == []
    (dropped,) = await ward.letters(all=True)
    assert (dropped["state"], dropped["event"]) == ("dropped", row["event"])
    shown = await ward.operator.show(row["letter"])
    assert (shown["state"], shown["dropped"]["reason"]) == ("dropped", "published again")


async def test_one_event_dead_at_two_subscribers_is_two_dead_letters(ward: Ward) -> None:
    counting, shipping = await failing(ward.bus), await ward.bus.start(Shipping)
    await ward.cli.publish("order.created", {"nonsense": True})
    await until(lambda: len(dead(ward.bus, shipping)) == len(dead(ward.bus, counting)) == 2)
    first, second = await ward.letters()
    assert first["event"] == second["event"]
    assert first["letter"] != second["letter"]


@pytest.mark.slow  # it goes through an hour of everybody's timers
async def test_it_is_still_told_when_its_publisher_has_expired(ward: Ward) -> None:
    counting = await failing(ward.bus)
    row = await ward.given_up(counting, data={"order_id": "o-1"})
    await ward.bus.stop(counting)
    await ward.bus.clock.advance(3_700)  # an hour is how long it is valid here
    (later,) = await ward.letters()
    assert later == row


class Calls:
    """Answers as the control role would, for the command line to draw."""

    ROW = {  # noqa: RUF012
        "letter": f"spiffe://test.local/agent/shipping#created/{'ab' * 32}.0",
        "state": "event",
        "reason": "no such order",
        "given_up_at": 1_700_000_000_000,
        "attempts": 3,
        "event": {"id": "i" * 26, "publisher": "spiffe://test.local/client/cli", "name": "order.created"},
    }

    async def list(self, *_: object, **__: object) -> dict[str, Any]:
        return {"letters": [self.ROW], "after": None}

    async def show(self, *_: object, **__: object) -> dict[str, Any]:
        return {**self.ROW, "not_redrivable": "it is none"}

    async def redrive(self, letter: str, **_: object) -> dict[str, Any]:
        if letter == self.ROW["letter"]:
            raise ConfigurationError("it is an event.", hint="Publish it again.")
        raise AgentCallError("there is no such dead letter")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...


def test_on_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "Operator", lambda _config: Calls())
    monkeypatch.setattr(command, "find_client_config", lambda _options: None)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    event, missing = Calls.ROW["letter"], f"spiffe://test.local/agent/shipping#created/{'cd' * 32}.0"
    assert main(["dlq", "list"]) == ExitCode.DONE
    listed = capsys.readouterr().out
    assert "order.created from spiffe://test.local/client/cli" in listed
    assert main(["dlq", "show", event]) == ExitCode.DONE
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("order.created", "spiffe://test.local/client/cli", "no such order"))
    assert "at most 3" in shown
    assert main(["dlq", "redrive", event]) == ExitCode.USAGE
    assert "it is an event. Publish it again." in capsys.readouterr().err
    assert main(["dlq", "redrive", missing, event]) == ExitCode.USAGE
    assert main(["dlq", "redrive", missing]) == ExitCode.FAILED
