"""Dead letters on a real broker: from a task that is given up to one that completes, by an operator."""

from __future__ import annotations

import asyncio
import json

import pytest
import yaml

from agentweave_bus.bus.streams import dead_stream_name
from agentweave_bus.bus.subjects import call_subject, task_subject
from agentweave_bus.cli import main
from agentweave_bus.envelope import control_role
from agentweave_bus.exceptions import AgentCallError, AuthorizationError
from agentweave_bus.types import TaskState
from tests.integration.connections import heard_within, until
from tests.integration.dead_letter_cast import *  # noqa: F403
from tests.integration.probes import CLI, DOMAIN, ECHO, OPERATOR, OTHER

pytestmark = pytest.mark.anyio

CONTROL = control_role(DOMAIN)


async def test_given_up_listed_shown_redriven_and_completed(sickbed):
    handle, row = await sickbed.given_up("ann")
    assert row["state"] == "waiting"
    assert row["reason"] == "ann is still sick"
    assert row["task"]["sender"] == str(CLI)
    shown = await sickbed.operator.show(row["letter"], payload=True)
    assert shown["payload"] == {"name": "ann"}
    assert shown["now"]["state"] == "failed"
    assert "not_redrivable" not in shown
    sickbed.probe.well = True
    heard = await sickbed.mallory.listen(task_subject(ECHO, "heal"))
    told = await sickbed.operator.redrive(row["letter"])
    assert told["reference"] == handle.reference
    await sickbed.state(handle, TaskState.COMPLETED)
    assert (await sickbed.cli.client.task(handle.reference).result(30)).data == {"healed": "ann"}
    assert sickbed.probe.ran == ["ann", "ann"]
    states = [one.state async for one in handle.events()]
    assert states == ["working", "failed", "working", "completed"]
    assert row["letter"] not in {one["letter"] for one in await sickbed.letters()}
    # What was queued, queued again by who owns the broker, runs nothing.
    replayed = (await heard_within(heard)).data
    for _ in range(3):
        await sickbed.mallory.send(task_subject(ECHO, "heal"), replayed)
    await sickbed.idle()
    assert sickbed.probe.ran == ["ann", "ann"]
    assert (await handle.status()).state is TaskState.COMPLETED
    (reissue,) = sickbed.control_audit(event="reissue", letter=row["letter"])
    assert (reissue["operator"], reissue["task"]) == (str(OPERATOR), handle.digest)


async def test_who_is_no_operator_is_denied_by_policy_and_by_the_broker(sickbed):
    handle, row = await sickbed.given_up("bob")
    other = await sickbed.operator_as(OTHER)
    with pytest.raises(AuthorizationError, match="no entry of operators"):
        await other.redrive(row["letter"])
    raw = await sickbed.world.raw(OTHER)
    await raw.send(call_subject(CONTROL, "dlq_redrive"), b"whatever")
    await until(lambda: bool(raw.refused), "the broker's refusal")
    assert "permissions violation" in raw.refused[0].lower()
    assert (await handle.status()).state is TaskState.FAILED
    assert sickbed.probe.ran == ["bob"]


async def test_an_operator_may_ask_the_control_role_and_publish_nothing_else_by_it(sickbed):
    raw = await sickbed.world.raw(OPERATOR)
    for subject in (
        task_subject(ECHO, "heal"),
        call_subject(CONTROL, "dlq_everything"),
        f"$JS.API.STREAM.MSG.GET.{dead_stream_name(ECHO)}",
        f"$JS.API.DIRECT.GET.{dead_stream_name(ECHO)}",
    ):
        raw.refused.clear()
        raw.refusal.clear()
        await raw.send(subject, b"{}")
        async with asyncio.timeout(30):
            await raw.refusal.wait()
        assert "permissions violation" in raw.refused[0].lower()


async def test_what_is_dropped_stays_and_is_listed_no_more(sickbed):
    _, row = await sickbed.given_up("cas")
    before = await sickbed.world.stored(sickbed.mallory, dead_stream_name(ECHO))
    await sickbed.operator.drop(row["letter"], reason="gone home")
    assert row["letter"] not in {one["letter"] for one in await sickbed.letters()}
    (dropped,) = [one for one in await sickbed.letters(all=True) if one["letter"] == row["letter"]]
    assert dropped["state"] == "dropped"
    assert await sickbed.world.stored(sickbed.mallory, dead_stream_name(ECHO)) == before + 1


async def test_after_the_broker_was_killed_a_dead_letter_can_still_be_redriven(sickbed):
    handle, row = await sickbed.given_up("dot")
    await sickbed.world.stack.nats.kill()
    await sickbed.world.stack.nats.start()
    sickbed.mallory = await sickbed.world.raw()
    sickbed.probe.well = True
    await sickbed.operator.redrive(row["letter"])
    await sickbed.state(handle, TaskState.COMPLETED)
    assert sickbed.probe.ran == ["dot", "dot"]
    with pytest.raises(AgentCallError, match="redriven already"):
        await sickbed.operator.redrive(row["letter"])


async def test_on_the_command_line(sickbed, tmp_path, capsys):
    """It runs in a thread: it has an event loop of its own, as it has in its process."""
    handle, row = await sickbed.given_up("eve")
    config = tmp_path / "operator.yaml"
    config.write_text(yaml.safe_dump(sickbed.world.settings(OPERATOR)))
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(sickbed.world.settings(OTHER)))

    async def dlq(*words, code=0, who=config):
        arguments = ["dlq", *words, "--config", str(who)]
        assert await asyncio.to_thread(main, arguments) == code
        return capsys.readouterr()

    listed = json.loads((await dlq("list", "--agent", str(ECHO), "--limit", "200")).out)
    assert row["letter"] in {one["letter"] for one in listed["letters"]}
    page = json.loads((await dlq("list", "--all", "--limit", "1")).out)
    assert len(page["letters"]) == 1
    rest = json.loads((await dlq("list", "--all", "--limit", "200", "--after", page["after"])).out)
    assert page["letters"][0] not in rest["letters"]
    shown = json.loads((await dlq("show", row["letter"])).out)
    assert shown["task"]["id"] == handle.id
    assert "payload" not in shown
    denied = await dlq("redrive", row["letter"], code=3, who=other)
    assert "no entry of operators" in denied.err
    sickbed.probe.well = True
    missing = f"{ECHO}#heal/{'0' * 64}.1"
    both = await dlq("redrive", missing, row["letter"], "--deadline", "60", code=1)
    assert "no such dead letter" in both.err
    assert [one["letter"] for one in json.loads(both.out)] == [row["letter"]]
    await sickbed.state(handle, TaskState.COMPLETED)
    assert "redriven already" in (await dlq("redrive", row["letter"], code=1)).err
    dropped = json.loads((await dlq("drop", row["letter"], "--reason", "well again")).out)
    assert dropped[0]["dropped"]["reason"] == "well again"
    assert "names no dead letter" in (await dlq("drop", "nonsense", code=2)).err
