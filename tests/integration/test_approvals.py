"""Approvals on a real broker: at once, through restarts, on the command line, and by the broker's permissions."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
import yaml

from agentweave_bus.bus.streams import state_stream_name
from agentweave_bus.bus.subjects import control_subject, record_subject
from agentweave_bus.cli import main
from agentweave_bus.exceptions import AuthorizationError
from tests.integration.approval_stage import *  # noqa: F403
from tests.integration.approval_stage import ApprovalStage
from tests.integration.probes import CLI, ECHO, FRONT, MIDDLE, OTHER, PATIENCE

pytestmark = pytest.mark.anyio


async def test_what_is_approved_of_starts_at_once(approval_stage: ApprovalStage) -> None:
    stage = approval_stage
    handle = await stage.waiting()
    await asyncio.sleep(0.3)  # so that it is back in its queue
    assert stage.echo.ran == []
    began = time.monotonic()
    await stage.other.client.task(handle.full_reference).approve("fine", timeout=PATIENCE)
    assert (await handle.result(PATIENCE)).data == {"worked": "much"}
    assert time.monotonic() - began < 30
    (control,) = stage.world.audit("echo", event="control", task=handle.id)
    digest = bytes.fromhex(control["digest"])
    files = [one for one in (stage.world.folder / "audit").rglob("*") if one.is_file()]
    assert any(digest in one.read_bytes() and b"approve" in one.read_bytes() for one in files)


async def test_what_is_rejected_never_runs(approval_stage: ApprovalStage) -> None:
    stage = approval_stage
    handle = await stage.waiting()
    status = await stage.other.client.task(handle.full_reference).reject("no", timeout=PATIENCE)
    assert status.state == "rejected"
    with pytest.raises(AuthorizationError, match="rejected by"):
        await handle.result(PATIENCE)
    assert stage.echo.ran == []


async def test_it_survives_a_restart_of_the_broker(approval_stage: ApprovalStage) -> None:
    stage = approval_stage
    handle = await stage.waiting()
    await asyncio.sleep(0.3)
    await stage.world.stack.nats.kill()
    await stage.world.stack.nats.start()
    await stage.other.client.task(handle.full_reference).approve(timeout=2 * PATIENCE)
    assert (await handle.result(2 * PATIENCE)).data == {"worked": "much"}
    assert stage.echo.ran == ["work"]


async def test_on_the_command_line(
    approval_stage: ApprovalStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = approval_stage
    handle = await stage.waiting()
    file = tmp_path / "anna.yaml"
    file.write_text(yaml.safe_dump(stage.world.settings(OTHER)))
    ask = ["task", "get", handle.full_reference, "--config", str(file), "--json"]
    assert await asyncio.to_thread(main, ask) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["state"], shown["approval"]["payload"]) == ("auth_required", {"text": "much"})
    mine = tmp_path / "cli.yaml"
    mine.write_text(yaml.safe_dump(stage.world.settings(CLI)))
    assert (
        await asyncio.to_thread(main, ["task", "get", handle.reference, "--config", str(mine), "--json"]) == 0
    )
    told = json.loads(capsys.readouterr().out)["full_reference"]
    assert told == handle.full_reference  # what the submitter hands to whoever may
    assert await asyncio.to_thread(main, ["task", "list", "--config", str(mine), "--json"]) == 0
    listed = {row["reference"]: row for row in json.loads(capsys.readouterr().out)}
    assert listed[handle.reference]["full_reference"] == told
    decide = ["task", "approve", told, "--reason", "ok", "--config", str(file), "--json"]
    assert await asyncio.to_thread(main, decide) == 0
    assert json.loads(capsys.readouterr().out)["state"] in ("submitted", "working", "completed")
    assert (await handle.result(PATIENCE)).status == "completed"
    assert (
        await asyncio.to_thread(main, ["task", "watch", handle.reference, "--config", str(mine), "--json"])
        == 0
    )
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["full_reference"] for one in events if "approval" in one] == [handle.full_reference]


async def test_the_broker_lets_an_approver_read_and_decide_and_nobody_else(
    approval_stage: ApprovalStage,
) -> None:
    key = "0d" * 32
    get = f"$JS.API.DIRECT.GET.{state_stream_name(ECHO)}."
    decides = [control_subject(ECHO, "approve"), control_subject(ECHO, "reject")]
    reads = [get + record_subject(ECHO, one, key, 0) for one in (CLI, FRONT)]
    beside = [get + record_subject(ECHO, MIDDLE, key, 0), record_subject(ECHO, CLI, key, 0)]
    approver = await approval_stage.world.raw(OTHER)
    for subject in decides + reads:
        await approver.client.publish(subject, b"")
    await approver.flush()
    assert approver.refused == []
    for subject in beside:
        await approver.denied(approver.client.publish(subject, b""))
    named_only = await approval_stage.world.raw(MIDDLE)
    for subject in decides + reads:
        await named_only.denied(named_only.client.publish(subject, b""))
