"""What operators see of tasks on a real broker, through a real control role."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anyio
import pytest
import yaml

from agentweave_bus import capability
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.cli import main
from agentweave_bus.envelope import control_role
from agentweave_bus.exceptions import AgentCallError, AuthorizationError, CallRefusedError, TaskCanceledError
from agentweave_bus.types import TaskState
from tests.integration.connections import until
from tests.integration.dead_letter_cast import DeadLetterCast, SickProbe
from tests.integration.probes import CLI, DOMAIN, ECHO, OPERATOR, OTHER, PATIENCE
from tests.integration.task_probe import TaskProbe

pytestmark = pytest.mark.anyio

CONTROL = control_role(DOMAIN)
SECRET = "what nobody else is to see"


class Watched(TaskProbe, SickProbe):
    """Has steps, too."""

    @capability("cook")
    async def cook(self, text: str) -> dict[str, Any]:
        """Do something in two steps."""
        for name in ("chop", "boil"):
            await self.context.step(name, lambda: {"done": text})
        return {"cooked": text}


@pytest.fixture(scope="module")
async def cast(session_world):
    probe = await session_world.agent(ECHO, Watched)
    cast = DeadLetterCast(
        session_world, probe, await session_world.client(CLI), None, await session_world.raw()
    )
    cast.operator = await cast.operator_as(OPERATOR)
    yield cast
    await session_world.clear()


async def caught_up(operator, after=None, limit=200):
    """The pages of all records from somewhere on, and where they end."""
    pages = []
    while True:
        page = await operator.observe_records(after, limit=limit)
        pages.append(page["records"])
        after = page["after"]
        if not page["more"]:
            return pages, after


async def test_records_as_they_come(cast):
    _, after = await caught_up(cast.operator)
    handle, _ = await cast.given_up("ann")
    (rows,), then = await caught_up(cast.operator, after)
    told = [(row["state"], row["epoch"], row["number"], row["capability"], row["id"]) for row in rows]
    assert told == [("working", 1, 0, "heal", handle.id), ("failed", 1, 1, None, None)]
    for row in rows:
        assert (row["genuine"], row["agent"], row["sender"]) == (True, str(ECHO), str(CLI))
        assert (row["key"], row["writer"], row["task"]) == (handle._ref.key, str(ECHO), handle.digest)
    assert rows[1]["error"] == "ann is still sick"
    assert await caught_up(cast.operator, then) == ([[]], then)


async def test_page_after_page_each_record_comes_once_and_in_order(cast):
    _, after = await caught_up(cast.operator)
    submit = cast.cli.client.submit
    handles = [await submit(str(ECHO), "work", {"text": SECRET}) for _ in range(5)]
    for handle in handles:
        await handle.result(PATIENCE)
    pages, then = await caught_up(cast.operator, after, limit=3)
    assert [len(page) for page in pages] == [3, 3, 3, 1]
    rows = [row for page in pages for row in page]
    assert len({row["digest"] for row in rows}) == len(rows)
    for handle in handles:
        assert [row["state"] for row in rows if row["key"] == handle._ref.key] == ["working", "completed"]
    assert SECRET not in json.dumps(pages)
    assert (await cast.operator.observe_records(then))["records"] == []
    # Behind the end of a stream is nothing: it must have begun anew.
    ahead = {agent: at + 10 for agent, at in then.items()}
    again, _ = await caught_up(cast.operator, ahead)
    assert {row["digest"] for row in rows} <= {row["digest"] for page in again for row in page}


async def test_one_task_with_its_steps_and_progress(cast):
    cooked = await cast.cli.client.submit(str(ECHO), "cook", {"text": SECRET})
    assert (await cooked.result(PATIENCE)).data == {"cooked": SECRET}
    made = await cast.cli.client.submit(str(ECHO), "pieces", {"count": 2})
    cast.probe.take_turns(2)
    assert (await made.result(PATIENCE)).data == {"count": 2}
    story = await cast.operator.observe_task(str(ECHO), str(CLI), cooked._ref.key)
    assert [row["state"] for row in story["records"]] == ["working", "completed"]
    assert [(step["genuine"], step["epoch"]) for step in story["steps"]] == [(True, 1)] * 2
    assert SECRET not in json.dumps(story)
    story = await cast.operator.observe_task(str(ECHO), str(CLI), made._ref.key)
    assert [row.get("text") for row in story["progress"]] == [
        *("artifact piece", "1 of 2"),
        *("artifact piece", "2 of 2"),
    ]
    assert story["steps"] == []
    nothing = await cast.operator.observe_task(str(ECHO), str(OTHER), cooked._ref.key)
    assert nothing == {"records": [], "steps": [], "progress": []}


async def test_what_waits_where(cast):
    async def waiting():
        await anyio.sleep(0.92)  # for as long one look stands for all
        told = await cast.operator.observe_queues()
        (pieces,) = [
            one for one in told["queues"] if (one["agent"], one["capability"]) == (str(ECHO), "pieces")
        ]
        counts = {kind: {one["agent"]: one for one in told[kind]} for kind in ("parked", "letters")}
        parked, letters = counts["parked"][str(ECHO)]["waiting"], counts["letters"][str(ECHO)]["count"]
        return pieces["pending"], pieces["in_flight"], parked, letters

    _, before, parked, letters = await waiting()
    cast.probe.entered.clear()
    handles = [await cast.cli.client.submit(str(ECHO), "pieces", {"count": 1}) for _ in range(3)]
    later = await cast.cli.client.submit(str(ECHO), "work", {}, delay=3_600)
    _, first = await cast.given_up("bea")
    await cast.given_up("bob")
    await cast.operator.drop(first["letter"])
    await cast.probe.entered.wait()
    pending, in_flight, *others = await waiting()
    assert pending + in_flight - before == 3
    assert in_flight >= 1
    assert others == [parked + 1, letters + 1]
    await later.cancel()
    cast.probe.take_turns(3)
    for handle in handles:
        await handle.result(PATIENCE)


async def test_watching_is_on_record_once_a_minute_and_looking_at_a_task_each_time(cast):
    operator = await cast.operator_as(OPERATOR)
    before = {one["digest"] for one in cast.control_audit(event="admission")}
    sent = len(cast.world.audit("operator", event="call", cap="observe_queues"))
    for _ in range(3):
        await operator.observe_queues()
    assert len(cast.world.audit("operator", event="call", cap="observe_queues")) == sent + 1
    for _ in range(2):
        await operator.observe_task(str(ECHO), str(CLI), "0" * 64)

    def mine(cap):
        found = cast.control_audit(event="admission", cap=cap)
        return [one for one in found if one["digest"] not in before]

    await until(lambda: len(mine("observe_task")) == 2, "the control role's records")
    assert len(mine("observe_queues")) <= 1  # this identity may have watched before
    assert all(one["action"] == "control:observe" and one["allowed"] for one in mine("observe_task"))
    watched = cast.control_audit(event="admission", cap="observe_queues", iss=str(OPERATOR))
    outcomes = [cast.control_audit(event="outcome", digest=one["digest"]) for one in watched]
    assert watched
    assert all(len(one) == 1 for one in outcomes)
    admitted = {one["digest"] for one in cast.control_audit(event="admission")}
    assert {one["digest"] for one in cast.control_audit(event="outcome")} <= admitted


async def test_who_is_no_operator_is_denied_by_policy_and_by_the_broker(cast):
    other = await cast.operator_as(OTHER)
    for ask in (
        other.observe_queues(),
        other.observe_records(),
        other.observe_task(str(ECHO), str(CLI), "0" * 64),
    ):
        with pytest.raises(AuthorizationError, match=r"no entry of operators lets .* do control:observe"):
            await ask
    raw = await cast.world.raw(OTHER)
    for name in ("observe_queues", "observe_records", "observe_task"):
        raw.refused.clear()
        raw.refusal.clear()
        assert (
            "permissions violation"
            in (await raw.denied(raw.send(call_subject(CONTROL, name), b"whatever"))).lower()
        )


async def test_an_operator_cancels_on_the_command_line(cast, tmp_path, capsys):
    """It runs in a thread: it has an event loop of its own, as it has in its process."""
    config = tmp_path / "operator.yaml"
    config.write_text(yaml.safe_dump(cast.world.settings(OPERATOR)))
    cast.probe.entered.clear()
    handle = await cast.cli.client.submit(str(ECHO), "pieces", {"count": 1})
    await cast.probe.entered.wait()
    words = ["task", "cancel", f"{handle.reference}@{CLI}", "--reason", "enough", "--config", str(config)]
    assert await asyncio.to_thread(main, words) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["message"]) == ("canceled", "enough")
    assert (await handle.status()).state is TaskState.CANCELED


async def test_an_operator_cancels_a_task_of_somebody_else(cast):
    cast.probe.entered.clear()
    cast.probe.cleaned_up.clear()
    handle = await cast.cli.client.submit(str(ECHO), "pieces", {"count": 1})
    await cast.probe.entered.wait()
    reference = f"{handle.reference}@{CLI}"
    status = await cast.operator.cancel(reference, "enough of that")
    assert (status.state, status.message) == (TaskState.CANCELED, "enough of that")
    assert cast.probe.cleaned_up.is_set()
    with pytest.raises(TaskCanceledError, match="enough of that"):
        await handle.result(PATIENCE)
    assert await cast.operator.cancel(reference) == status  # as it has ended
    (record,) = cast.world.audit("echo", event="control", task=handle.id)
    assert (record["caller"], record["action"]) == (str(OPERATOR), "control:cancel")
    with pytest.raises(CallRefusedError, match="only its submitter"):
        await cast.operator.cancel(f"{ECHO}#pieces/{handle.id}@{OTHER}")
    other = await cast.operator_as(OTHER)
    with pytest.raises(AuthorizationError):
        await other.cancel(reference)


@pytest.mark.parametrize(
    "after",
    [
        {"nobody": 1},
        {str(ECHO): -1},
        {str(ECHO): "1"},
        {str(ECHO): True},
        {f"{ECHO}{number}": 1 for number in range(5_000)},
    ],
    ids=["no agent", "negative", "text", "truth", "too many"],
)
async def test_a_cursor_that_no_answer_ended_with_is_refused(cast, after):
    with pytest.raises(AgentCallError, match="after"):
        await cast.operator.observe_records(after)


@pytest.mark.parametrize("asked", [{"limit": 0}, {"limit": 201}])
async def test_a_page_has_a_bounded_size(cast, asked):
    with pytest.raises(AgentCallError, match="limit"):
        await cast.operator.observe_records(**asked)


async def test_after_the_broker_was_killed_it_goes_on(cast):
    _, after = await caught_up(cast.operator)
    await cast.world.stack.nats.kill()
    await cast.world.stack.nats.start()
    handle = await cast.cli.client.submit(str(ECHO), "work", {"text": "again"})
    assert (await handle.result(PATIENCE)).status == "completed"
    pages, _ = await caught_up(cast.operator, after)
    states = [row["state"] for page in pages for row in page if row["key"] == handle._ref.key]
    assert states == [TaskState.WORKING.value, TaskState.COMPLETED.value]
