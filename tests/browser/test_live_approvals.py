"""Approving and rejecting on the page, of tasks that a real agent holds back until somebody does."""

from __future__ import annotations

import pytest

from agentweave_bus.console import open_console
from agentweave_bus.types import TaskState
from tests.integration.approval_stage import *  # noqa: F403
from tests.integration.probes import OTHER, PATIENCE, Held

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@pytest.fixture
async def console(approval_stage):
    held = await Held.open(open_console(operator=approval_stage.world.config(OTHER), actions=True))
    yield held.value
    await held.close()


async def test_what_waits_is_approved_or_rejected_on_the_page(approval_stage, console, new_tab):
    wanted, unwanted = await approval_stage.waiting(), await approval_stage.waiting()
    tab = await new_tab(console.url)

    def waiting(handle):
        return f"#approvals li:has([href='#/task/{handle._ref.key}'])"

    await tab.page.click(f"{waiting(wanted)} .go")
    await tab.page.click("#ask .go")
    await tab.page.wait_for_selector(waiting(wanted), state="detached")
    assert (await wanted.result(PATIENCE)).status == "completed"
    await tab.page.click(f"{waiting(unwanted)} .what")  # in its story it can be done, too
    await tab.page.click("#story .stop:text('Reject')")
    await tab.page.fill("#ask input", "too much")
    await tab.page.click("#ask .stop")
    await tab.page.wait_for_selector("#story [data-state=rejected] >> text=too much")
    status = await unwanted.status()
    assert status.state is TaskState.REJECTED
    assert len(approval_stage.echo.ran) == 1
