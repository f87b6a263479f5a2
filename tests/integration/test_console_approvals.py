"""Deciding on tasks from the console's page, on a real broker, as who may and as who may not."""

from __future__ import annotations

import asyncio

import pytest

from agentweave_bus.console import open_console
from agentweave_bus.types import TaskState
from tests.integration.approval_stage import *  # noqa: F403
from tests.integration.console_browser import Browser
from tests.integration.probes import CLI, OTHER, Held

pytestmark = pytest.mark.anyio


async def page_of(stage, identity):
    """A browser on a console that acts as somebody."""
    held = await Held.open(open_console(operator=stage.world.config(identity), actions=True))
    stage.world._held.append(held)
    browser = await Browser.at(held.value.url)
    async with browser.events() as events, asyncio.timeout(30):
        # Who may not look is told so, and by that it is connected, too.
        await events.until(
            lambda state: (broker := state["sources"]["broker"])["ok"] or "observe" in broker["why"]
        )
    return browser


async def test_approving_and_rejecting(approval_stage):
    stage = approval_stage
    page = await page_of(stage, OTHER)
    approved, rejected = await stage.waiting(), await stage.waiting()
    answer = await page.act("approve", approved.full_reference, "a good customer")
    assert answer.status == 200, answer
    assert answer.json["said"].startswith("approved; ")
    assert (await approved.result(10)).status == "completed"
    answer = await page.act("reject", rejected.full_reference, "too much")
    assert (answer.status, answer.json["said"]) == (200, "rejected; the task is rejected")
    assert (await rejected.status()).state is TaskState.REJECTED
    heard = stage.world.audit("echo", action="control:approve", caller=str(OTHER))
    assert [one["allowed"] for one in heard] == [True]


async def test_a_decision_that_does_not_count_is_told(approval_stage):
    page = await page_of(approval_stage, CLI)
    handle = await approval_stage.waiting()
    refused = await page.act("approve", handle.full_reference)
    assert refused.status == 403
    assert "takes part in the task" in refused.json["error"]
    cancelled = await page.act("cancel", handle.full_reference, "enough")
    assert (cancelled.status, cancelled.json["said"]) == (200, "the task is canceled")
