"""The page on a real broker with a real agent behind it: tasks as they come, a broker that goes, and what is done here."""

from __future__ import annotations

import time

import pytest

from agentweave_bus.console import open_console
from agentweave_bus.types import TaskState
from tests.integration.dead_letter_cast import *  # noqa: F403
from tests.integration.probes import ECHO, OPERATOR, Held

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def console(dead_letter_cast):
    world = dead_letter_cast.world
    held = await Held.open(
        open_console(operator=world.config(OPERATOR), audit=(world.folder / "audit",), actions=True)
    )
    yield held.value
    await held.close()


async def test_a_submitted_task_shows_within_two_seconds_and_tells_its_story(sickbed, console, new_tab):
    sickbed.probe.well = True
    tab = await new_tab(console.url)
    await tab.page.wait_for_selector(".tasks-panel:not([data-stale])")
    for left in (2, 1, 0):  # other work on the machine is not the console's
        began = time.monotonic()
        handle = await sickbed.cli.client.submit(str(ECHO), "heal", {"name": "ann"})
        row = f"#tasks tr:has([title='{handle.id}'])"
        await tab.page.wait_for_selector(row)
        if (took := time.monotonic() - began) < 2:
            break
        assert left, took
    await tab.page.wait_for_selector(f"{row}[data-state=completed]")
    await tab.page.click(f"{row} .what")
    await tab.page.wait_for_selector("#story .timeline [data-kind=outcome]")
    assert await tab.text("#story .chain") == "client/cli heal agent/echo"
    told = await tab.text("#story .timeline")
    for wanted in (
        "Submitted heal",
        "Let in",
        "Working",
        "Completed",
        "signed by agent/echo",
        "audit echo #",
        "policy",
    ):
        assert wanted in told, wanted
    assert "ann" not in await tab.text("#story")  # payloads are not told


async def test_a_dead_letter_is_redriven_from_the_page(sickbed, console, new_tab):
    tab = await new_tab(console.url)
    handle, row = await sickbed.given_up("cid")
    letter = f"#letters li:has([title='{row['letter']}'])"
    await tab.page.wait_for_selector(letter)
    assert "cid is still sick" in await tab.text(letter)
    sickbed.probe.well = True
    await tab.page.click(f"{letter} .go")
    await tab.page.click("#ask .go")
    await tab.page.wait_for_selector("#said[data-shown]")
    assert await tab.text("#said") == "Done: queued again, attempt 2."
    await sickbed.state(handle, TaskState.COMPLETED)
    await tab.page.wait_for_selector(f"{letter} .go", state="hidden")  # nobody does it twice


# The last one here: connections of others in the cast end with the broker.
@pytest.mark.slow
async def test_the_page_lives_on_when_the_broker_comes_back(sickbed, console, new_tab):
    sickbed.probe.well = True
    tab = await new_tab(console.url)
    await tab.page.wait_for_selector(".tasks-panel:not([data-stale])")
    nats = sickbed.world.stack.nats
    await nats.kill()
    await tab.page.wait_for_selector(".tasks-panel[data-stale]")
    assert "No broker." in await tab.text("#troubles")
    await nats.start()
    await tab.page.wait_for_selector(".tasks-panel:not([data-stale])")
    handle = await sickbed.cli.client.submit(str(ECHO), "heal", {"name": "bea"})
    await tab.page.wait_for_selector(f"#tasks tr[data-state=completed]:has([title='{handle.id}'])")
