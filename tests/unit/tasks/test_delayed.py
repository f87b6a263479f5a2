"""Delayed and recurring tasks on the bus in memory, whose clock is put forward."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus import SecureAgent, capability
from agentweave_bus.bus.streams import parked_stream_name, tasks_stream_name, wakeups_stream
from agentweave_bus.envelope import new_id
from agentweave_bus.exceptions import (
    AuthorizationError,
    CallRefusedError,
    CallTimeoutError,
    NoResponderError,
    TaskCanceledError,
)
from agentweave_bus.runtime import AgentWeaveClient
from agentweave_bus.tasks.handle import TaskHandle
from agentweave_bus.testing import MemoryBus
from agentweave_bus.types import TaskState

pytestmark = pytest.mark.anyio

HOUR = 60
"""As long as the tests have patience for: a clock that is put forward wakes all that is due in between."""


SECTION = (
    (Path(__file__).parents[3] / "docs" / "durable-tasks.md").read_text().partition("## Later, again")[2]
)


class Clockwork(SecureAgent):
    """Notes when it was asked for what, and by whom."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.ran: list[tuple[str, str, str]] = []

    @capability("strike")
    async def strike(self, name: str) -> str:
        context = self.context
        self.ran.append((name, context.caller_spiffe_id, context.kind))
        return name

    @capability("later")
    async def later(self, name: str) -> str:
        handle = await self.submit_agent(str(self.spiffe_id), "strike", {"name": name}, delay=HOUR)
        return handle.reference

    @capability("relay")
    async def relay(self, name: str) -> str:
        result = await self.call_agent(str(self.spiffe_id), "strike", {"name": name})
        return str(result.data)


class Setting:
    """A bus, an agent and a client."""

    def __init__(self, bus: MemoryBus, agent: Clockwork, cli: AgentWeaveClient) -> None:
        self.bus, self.agent, self.cli = bus, agent, cli
        self.target = str(bus.id("agent/clockwork"))

    async def submit(self, capability: str = "strike", name: str = "a", **options: Any) -> TaskHandle:
        return await self.cli.submit(self.target, capability, {"name": name}, **options)

    async def ran(self, count: int) -> list[str]:
        """Wait until so many have run, and return which."""
        async with asyncio.timeout(30):
            while len(self.agent.ran) < count:  # noqa: ASYNC110 - handlers tell nobody
                await asyncio.sleep(0.01)
        return [name for name, _, _ in self.agent.ran]

    def stored(self) -> dict[str, int]:
        agent = self.bus.id("agent/clockwork")
        streams = self.bus.broker.jetstream.streams
        names = {
            "parked": parked_stream_name(agent),
            "tasks": tasks_stream_name(agent),
            "wakeups": wakeups_stream(self.bus.trust_domain).name,
        }
        return {kind: len(streams[name].messages) for kind, name in names.items()}

    async def nothing_is_left(self) -> None:
        async with asyncio.timeout(30):
            while any(self.stored().values()):  # noqa: ASYNC110 - the broker tells nobody
                await asyncio.sleep(0.01)


@pytest.fixture
async def clock(bus: MemoryBus) -> Setting:
    await bus.grant("client/cli", "agent/clockwork", "*")
    await bus.grant("agent/clockwork", "agent/clockwork", "*")
    agent = await bus.start(Clockwork)
    return Setting(bus, agent, await bus.client("client/cli"))


async def test_a_delayed_task_runs_when_it_is_due_and_as_who_submitted_it(clock: Setting) -> None:
    handle = await clock.submit(delay=2 * HOUR)
    await clock.bus.clock.advance(2 * HOUR - 5)
    assert clock.agent.ran == []
    assert (await handle.status()).state is TaskState.SUBMITTED
    assert clock.stored() == {"parked": 1, "tasks": 0, "wakeups": 1}
    await clock.bus.clock.advance(10)
    assert (await handle.result(10)).data == "a"
    assert clock.agent.ran == [("a", str(clock.bus.id("client/cli")), "task")]
    await clock.nothing_is_left()
    (admission,) = clock.bus.audit("agent/clockwork", event="admission", action="strike")
    assert admission["caller"] == str(clock.bus.id("client/cli"))


async def test_at_a_time_and_in_any_order(clock: Setting) -> None:
    now = clock.bus.clock.now()
    late = await clock.submit(name="late", at=now + timedelta(seconds=3 * HOUR))
    soon = await clock.submit(name="soon", at=now + timedelta(seconds=HOUR), priority=9)
    past = await clock.submit(name="past", at=now - timedelta(seconds=30))
    assert (await past.result(10)).data == "past"
    await clock.bus.clock.advance(4 * HOUR)
    await late.result(10)
    await soon.result(10)
    assert await clock.ran(3) == ["past", "soon", "late"]


async def test_a_time_long_past_is_taken_for_a_slip(clock: Setting) -> None:
    with pytest.raises(CallRefusedError, match="is past: leave it out"):
        await clock.submit(at=clock.bus.clock.now() - timedelta(minutes=5))


async def test_a_delayed_task_is_cancelled_before_it_is_due(clock: Setting) -> None:
    handle = await clock.submit(delay=HOUR)
    assert (await handle.cancel("no need")).state is TaskState.CANCELED
    await clock.bus.clock.advance(2 * HOUR)
    with pytest.raises(TaskCanceledError, match="no need"):
        await handle.result(10)
    await clock.nothing_is_left()
    assert clock.agent.ran == []


async def test_a_recurring_task_comes_again_until_it_is_cancelled(clock: Setting) -> None:
    handle = await clock.submit(every="1m")
    await clock.bus.clock.advance(3.5 * HOUR)
    assert await clock.ran(3) == ["a", "a", "a"]
    assert (await handle.status()).state is TaskState.SUBMITTED
    await handle.cancel()
    await clock.bus.clock.advance(3 * HOUR)
    await clock.nothing_is_left()
    assert len(clock.agent.ran) == 3


async def test_occurrences_are_tasks_of_their_own_with_handles(clock: Setting) -> None:
    first = clock.bus.clock.now() + timedelta(seconds=HOUR)
    handle = await clock.submit(every="30s", at=first)
    second = clock.cli.occurrence(handle, first + timedelta(seconds=HOUR / 2))
    assert (await second.status()).state is TaskState.SUBMITTED
    await clock.bus.clock.advance(1.9 * HOUR)
    assert (await clock.cli.occurrence(handle, first).result(10)).data == "a"
    assert (await second.result(10)).data == "a"
    assert len({handle.id, second.id, clock.cli.occurrence(handle, first).id}) == 3


def milliseconds(clock: Setting, ahead_s: float = 0) -> int:
    return clock.bus.clock.time_ns() // 1_000_000 + int(ahead_s * 1000)


def about(at_ms: int) -> Any:
    return pytest.approx(at_ms, abs=2_000)


async def test_a_status_says_when_a_delayed_task_is_due_until_it_has_begun(clock: Setting) -> None:
    due = milliseconds(clock, HOUR)
    handle = await clock.submit(delay=HOUR)
    of_reference = clock.cli.task(handle.reference)
    for one in (handle, of_reference):
        status = await one.status()
        assert (status.due_at, status.every, status.last_occurrence) == (about(due), None, None)
    await clock.bus.clock.advance(HOUR + 5)
    await handle.result(10)
    for one in (handle, of_reference, clock.cli.task(handle.reference)):
        assert (await one.status()).due_at is None
    assert (await (await clock.submit()).status()).due_at is None


async def test_a_status_says_how_a_task_comes_again_and_what_ran_last(clock: Setting) -> None:
    planned = milliseconds(clock, HOUR)
    handle = await clock.submit(every="1m", deadline=2.5 * HOUR)
    of_reference = clock.cli.task(handle.reference)
    status, first = await of_reference.status(), (await handle.status()).due_at
    assert first == about(planned)
    assert (status.due_at, status.every, status.last_occurrence) == (first, "1m", None)
    await clock.bus.clock.advance(2 * HOUR + 5)
    await clock.ran(2)
    for one in (handle, of_reference, clock.cli.task(handle.reference)):
        status = await one.status()
        assert (status.state, status.due_at, status.every) == ("submitted", first + 2 * HOUR * 1000, "1m")
        last = status.last_occurrence
        assert last is not None
        assert last.at_ms == first + HOUR * 1000
        found = clock.cli.task(last.reference)
        assert (await found.result(10)).data == "a"
        assert (found.id, last.state) == (last.id, "completed")
    await clock.bus.clock.advance(3 * HOUR)
    status = await handle.status()
    assert status.due_at is None  # it comes no more
    assert status.to_json()["last_occurrence"]["at"] == first + 2 * HOUR * 1000
    assert status.to_json()["every"] == "1m"


async def test_an_occurrence_that_has_not_begun_is_not_the_last_one(clock: Setting) -> None:
    handle = await clock.submit(every="1m")
    await clock.bus.clock.advance(1.5 * HOUR)
    await clock.ran(1)
    began = milliseconds(clock, -HOUR / 2)
    await clock.bus._control.stop()
    await clock.bus.clock.advance(2 * HOUR)
    for one in (handle, clock.cli.task(handle.reference)):
        last = (await one.status()).last_occurrence
        assert last is not None
        assert last.at_ms == about(began)


async def test_what_was_cancelled_is_due_no_more(clock: Setting) -> None:
    once, again = await clock.submit(delay=HOUR), await clock.submit(every="1m")
    for handle in (once, again):
        status = await handle.cancel()
        assert (status.state, status.due_at) == ("canceled", None)
    assert (await again.status()).every == "1m"


async def test_when_it_is_due_is_known_by_who_submitted_it_alone(clock: Setting) -> None:
    handle = await clock.submit(every="1m")
    await clock.bus.grant("client/other", "agent/clockwork", "*")
    other = await clock.bus.client("client/other")
    status = await other.task(handle.reference).status()  # as if it were its own
    assert (status.due_at, status.every) == (None, None)


async def test_a_recurring_task_ends_with_its_deadline(clock: Setting) -> None:
    handle = await clock.submit(every="1m", deadline=2.5 * HOUR)  # from the first time on
    await clock.bus.clock.advance(8 * HOUR)
    assert await clock.ran(3) == ["a"] * 3
    await clock.nothing_is_left()
    with pytest.raises(CallTimeoutError):
        await handle.result(10)


async def test_by_the_fields_of_cron(clock: Setting) -> None:
    await clock.submit(every="*/2 * * * *")
    await clock.bus.clock.advance(6 * HOUR + 1)
    assert len(await clock.ran(3)) == 3


async def test_what_was_missed_is_made_up_for_once(clock: Setting) -> None:
    """While no control role is there; the same of a delayed task, which comes late."""
    await clock.submit(every="1m", name="again")
    delayed = await clock.submit(delay=HOUR, name="once")
    await clock.bus._control.stop()
    await clock.bus.clock.advance(5.5 * HOUR)
    assert clock.agent.ran == []
    clock.bus._control = type(clock.bus._control)()
    await clock.bus._control.begin(clock.bus._run_control_role)
    await delayed.result(10)
    assert sorted(await clock.ran(2)) == ["again", "once"]
    await clock.bus.clock.advance(HOUR)
    assert sorted(await clock.ran(3)) == ["again", "again", "once"]


async def test_no_task_is_lost_with_the_authority_of_who_submitted_it(clock: Setting) -> None:
    handle = await clock.submit(delay=2 * HOUR)
    await clock.bus.clock.advance(HOUR)
    await clock.bus.rotate_ca()
    await clock.bus.clock.advance(HOUR + 1)
    assert (await handle.result(10)).data == "a"


async def test_a_handler_delays_and_what_it_delayed_says_for_whom(clock: Setting) -> None:
    result = await (await clock.submit("later", "nested")).result(10)
    assert clock.agent.ran == []
    await clock.bus.clock.advance(HOUR + 10)
    assert await clock.ran(1) == ["nested"]
    (admission,) = clock.bus.audit("agent/clockwork", event="admission", action="strike")
    assert [link["iss"] for link in admission["input"]["context"]["via"]] == [str(clock.bus.id("client/cli"))]
    assert result.data


async def test_what_a_delayed_task_asks_for_says_who_asked_for_that(clock: Setting) -> None:
    handle = await clock.submit("relay", delay=HOUR)
    await clock.bus.clock.advance(HOUR + 10)
    assert (await handle.result(10)).data == "a"
    (admission,) = clock.bus.audit("agent/clockwork", event="admission", action="strike")
    (link,) = admission["input"]["context"]["via"]
    control = f"spiffe://{clock.bus.trust_domain}/agentweave/control"
    assert (link["iss"], link["kind"], link["reissued_by"]) == (
        str(clock.bus.id("client/cli")),
        "task",
        control,
    )


async def test_the_policy_of_when_it_is_due_counts(clock: Setting) -> None:
    handle = await clock.submit(delay=HOUR)
    cli = str(clock.bus.id("client/cli"))
    entry = {"caller": cli, "callee": clock.target, "capabilities": ["relay"]}
    await clock.bus.set_grants({"grants": [entry]})
    await clock.bus.clock.advance(HOUR + 10)
    with pytest.raises(AuthorizationError):
        await handle.result(10)
    assert clock.agent.ran == []


async def test_no_agent_no_parking(clock: Setting) -> None:
    await clock.bus.grant("client/cli", "agent/nobody", "*")
    with pytest.raises(NoResponderError):
        await clock.cli.submit(str(clock.bus.id("agent/nobody")), "strike", {}, delay=HOUR)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"delay": 31 * 86_400}, "31 days"),
        ({"delay": -1}, "a delay is"),
        ({"delay": True}, "a delay is"),
        ({"delay": float("nan")}, "a delay is"),
        ({"delay": 1, "at": "at"}, "not both"),
        ({"at": "naive"}, "time zone"),
        ({"every": "often"}, "comes again"),
        ({"every": "1h", "deadline": -1}, "a deadline"),
        ({"deadline": float("nan")}, "a deadline"),
    ],
)
async def test_what_can_not_be(clock: Setting, options: dict[str, Any], said: str) -> None:
    now = clock.bus.clock.now()
    options = {
        key: {"at": now, "naive": now.replace(tzinfo=None)}.get(one, one) if key == "at" else one
        for key, one in options.items()
    }
    with pytest.raises(CallRefusedError, match=said):
        await clock.submit(**options)


async def test_one_idempotency_key_is_one_delayed_task(clock: Setting) -> None:
    key = new_id(0)
    handles = [await clock.submit(delay=HOUR, idempotency_key=key) for _ in range(3)]
    await clock.bus.clock.advance(HOUR + 10)
    assert {(await one.result(10)).data for one in handles} == {"a"}
    await clock.nothing_is_left()
    assert len(clock.agent.ran) == 1


async def test_the_page_says_what_can_be_submitted(clock: Setting) -> None:
    namespace: dict[str, Any] = {}
    exec(
        compile(SECTION.partition("```python\n")[2].partition("```")[0], "durable-tasks.md", "exec"),
        namespace,
    )
    said: list[dict[str, Any]] = []

    class Client:
        async def submit(self, _target: str, _name: str, _payload: Any, **options: Any) -> TaskHandle:
            said.append(options)
            return await clock.submit(**options)

    reference = await namespace["plan"](Client())
    assert [set(one) for one in said] == [{"delay"}, {"at"}, {"every", "deadline"}, {"priority"}]
    assert (await clock.cli.task(reference).status()).state is TaskState.SUBMITTED
    assert clock.stored()["parked"] == 3
