"""The page in a real browser, before the real gate and headers, with a model that each test fills."""

from __future__ import annotations

import pytest

from agentweave_bus.types import TaskState
from tests.browser.stage import AGENT, CLIENT, Stage, decision, key_of, letter, record, worker

pytestmark = pytest.mark.anyio

MANY = 10_000
BEAT = {"lag_s": 1.2, "in_flight": 3, "handled": 9, "resident": 96 << 20, "connected": True, "svid_s": None}
HOSTILE = '<img src=x onerror="window.ran = 1"><script>window.ran = 2</script>'
ROWS = "document.querySelectorAll('tr, li, article').length"
with_actions = pytest.mark.parametrize("stage", [{"actions": True}], indirect=True)


async def test_shows_what_is_known_and_complains_of_nothing(stage, new_tab):
    stage.model.add_records(
        [record(1), record(2, TaskState.WORKING), record(3, TaskState.FAILED, message="no card")]
    )
    stage.model.add_decisions([decision(1), decision(2, allowed=False, reason="nobody granted that")])
    stage.model.set_workers(
        [worker(1, state="given up", why="exit code 2"), worker(2, up_s=7_200.0, pid=4711, beat=BEAT)]
    )
    stage.model.set_letters([letter(3)], more=False)
    tab = await stage_tab(stage, new_tab)
    assert await tab.text("#as") == "as client/operator"
    assert await tab.text("#mode") == "read-only"
    assert "order-1 given up · exit code 2" in await tab.text("#agents tr[data-state='given up']")
    assert await tab.text("#agents tr[data-state=ready]") == "order-2 4711 2 h 96 MB 1.2 s 3 none"
    assert (
        await tab.page.locator("#agents tr[data-state=ready] [data-bad]").count() == 2
    )  # its lag, no identity
    assert "the card was declined" in await tab.text("#letters")
    assert "denied: nobody granted that" in await tab.text("#decisions [data-verdict=denied]")
    assert await tab.text(".count[data-state=failed]") == "1 Failed"
    assert await tab.text("#tasks tr:first-child .c-state") == "Completed"
    assert await tab.page.get_attribute("#tasks tr:first-child .c-from", "title") == CLIENT


async def test_on_a_phone_what_waits_for_a_person_stands_before_the_long_lists(stage, new_tab):
    stage.model.add_records([record(n) for n in range(40)] + [record(99, TaskState.AUTH_REQUIRED)])
    stage.model.add_decisions(decision(number) for number in range(9))
    stage.model.set_workers([worker(1, beat=BEAT)])
    stage.model.set_letters([letter(3)], more=False)
    tab = await new_tab(stage.url, viewport={"width": 390, "height": 844})
    tops = [
        await tab.page.evaluate(f"document.querySelector('.{name}').getBoundingClientRect().top")
        for name in (
            "flow",
            "agents-panel",
            "approvals-panel",
            "letters-panel",
            "tasks-panel",
            "decisions-panel",
        )
    ]
    assert tops == sorted(tops)
    assert await tab.page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.slow  # a browser takes its time
async def test_ten_thousand_tasks_are_painted_as_soon_as_two_hundred_and_in_as_many_rows(stage, new_tab):
    """How soon that is in seconds is the machine's affair: 0.5 to 1.6 s on two processors with other work."""
    stage.model.add_decisions(decision(number) for number in range(300))
    stage.model.set_letters([letter(number) for number in range(50)], more=True)

    async def first_paint(note):
        tab = await stage_tab(stage, new_tab)
        await tab.until("document.querySelectorAll('#tasks tr').length === 200")
        assert note in await tab.text("#tasks-note")
        assert await tab.page.evaluate(ROWS) < 450
        return await tab.page.evaluate(FIRST_PAINT)

    stage.model.add_records(record(number) for number in range(200))
    few = [await first_paint("200") for _ in range(3)]
    stage.model.add_records(record(number) for number in range(200, MANY))
    many = []
    for _ in range(5):  # other work on the machine is not the page's
        many.append(await first_paint("200 of 10,000"))
        if many[-1] < 2 * max(few):
            break
    assert min(many) < 2 * max(few), (few, many)


FIRST_PAINT = """new Promise((resolve) => new PerformanceObserver((list) => {
  const found = list.getEntriesByName("first-contentful-paint");
  if (found.length) resolve(found[0].startTime);
}).observe({ type: "paint", buffered: true }))"""


async def test_what_somebody_wrote_is_shown_as_text_and_runs_nothing(stage, new_tab):
    stage.model.add_records(
        [record(1, TaskState.AUTH_REQUIRED, capability=HOSTILE, id=HOSTILE, sender=HOSTILE, message=HOSTILE)]
    )
    stage.model.add_decisions(
        [decision(1, caller=HOSTILE, action=HOSTILE, reason=f"{HOSTILE} \u202eexe.png", allowed=False)]
    )
    stage.model.set_letters([letter(1, reason=HOSTILE)], more=False)
    stage.model.set_workers([worker(1, agent=HOSTILE, name=HOSTILE, state=HOSTILE, why=HOSTILE)])
    stage.model.source_failed("workers", HOSTILE)
    stage.story = {
        "chain": [{"who": HOSTILE, "asked": HOSTILE, "id": HOSTILE, "agent": HOSTILE}],
        "principal": {"iss": HOSTILE, "sub": HOSTILE},
        "timeline": [
            {"at": 1, "kind": HOSTILE, "who": HOSTILE, "title": HOSTILE, "text": HOSTILE, "digest": HOSTILE}
        ],
    }
    tab = await stage_tab(stage, new_tab)
    for place in ("#tasks .c-said", "#decisions", "#letters", "#agents", "#troubles", "#approvals"):
        assert HOSTILE in await tab.text(place), place
    assert "\\u202eexe.png" in await tab.text("#decisions")  # what turns the reading direction is written out
    await tab.page.click("#tasks .what")
    await tab.page.wait_for_selector("#story .timeline")
    assert HOSTILE in await tab.text("#story .chain")
    assert HOSTILE in await tab.text("#story .timeline")
    assert await tab.page.evaluate("document.querySelectorAll('body img, body script').length") == 0
    assert await tab.page.evaluate("window.ran") is None


async def test_the_keyboard_opens_and_closes_a_story(stage, new_tab):
    stage.model.add_records([record(1), record(2)])
    tab = await stage_tab(stage, new_tab)
    await tab.page.keyboard.press("/")
    await tab.page.keyboard.type("task-2")
    await tab.until("document.querySelectorAll('#tasks tr').length === 1")
    await tab.page.keyboard.press("Tab")  # the list, which scrolls
    await tab.page.keyboard.press("Tab")
    assert await tab.page.evaluate("document.activeElement.matches('#tasks a:focus-visible')")
    await tab.page.keyboard.press("Enter")
    await tab.page.wait_for_selector("#story[open] .facts")
    assert tab.page.url.endswith(f"#/task/{key_of(2)}")
    assert "task-2" in await tab.text("#story")
    await tab.page.keyboard.press("Escape")
    await tab.page.wait_for_selector("#story", state="hidden")
    await tab.until("!location.hash")
    assert await tab.page.evaluate("document.activeElement.matches('#tasks a')")


async def test_read_only_there_is_no_button_that_does_anything(stage, new_tab):
    stage.model.add_records([record(1, TaskState.AUTH_REQUIRED), record(2, TaskState.WORKING)])
    stage.model.set_letters([letter(3)], more=False)
    tab = await stage_tab(stage, new_tab)
    await tab.page.wait_for_selector("#approvals .what")
    assert await tab.page.locator(".go, .stop").count() == 0
    for number in (1, 2):
        await tab.page.evaluate("(key) => { location.hash = `#/task/${key}`; }", key_of(number))
        await tab.page.wait_for_selector(f"#story .facts :text('task-{number}')")
        assert await tab.page.locator(".go, .stop").count() == 0


@with_actions
async def test_what_is_done_is_asked_for_once_more_and_repeats_the_page_s_own_value(stage, new_tab):
    stage.model.add_records([record(1, TaskState.AUTH_REQUIRED)])
    stage.model.set_letters([letter(3)], more=False)
    tab = await stage_tab(stage, new_tab)
    await tab.page.click("#letters .stop")
    await tab.page.keyboard.press("Escape")
    assert stage.acted == []
    await tab.page.click("#letters .stop")
    await tab.page.fill("#ask input", "done by hand")
    await tab.page.keyboard.press("Enter")
    await tab.until("document.getElementById('said').textContent === 'Done: drop.'")
    await tab.page.click("#approvals .go")
    await tab.page.click("#ask .go")
    await tab.until("document.getElementById('said').textContent === 'Done: approve.'")
    reference = stage.model.tasks.get(key_of(1)).reference
    assert stage.acted == [
        ("drop", {"ref": letter(3)["letter"], "reason": "done by hand"}),
        ("approve", {"ref": reference, "reason": ""}),
    ]


@pytest.mark.slow  # a browser takes its time
async def test_a_change_touches_its_own_row_and_no_other(stage, new_tab):
    stage.model.add_records([record(number) for number in range(1, 60)])
    tab = await stage_tab(stage, new_tab)
    await tab.page.wait_for_selector("#tasks tr:nth-child(59)")
    await tab.page.evaluate("""() => {
      window.kept = [...document.querySelectorAll("#tasks tr")];
      window.made = 0;
      new MutationObserver((all) => all.forEach((one) => { window.made += one.addedNodes.length; }))
        .observe(document.getElementById("tasks"), { childList: true });
    }""")
    stage.model.add_records([record(0, TaskState.WORKING)])
    await tab.page.wait_for_selector("#tasks tr:nth-child(60)")
    assert await tab.page.evaluate("window.made") == 1
    assert await tab.page.evaluate("window.kept.every((one) => one.isConnected)")


@pytest.mark.slow  # a browser takes its time
async def test_a_state_is_chosen_and_the_server_finds_its_tasks(stage, new_tab):
    stage.model.add_records([record(number) for number in range(300)])
    stage.model.add_records([record(1_000, TaskState.FAILED, message="long ago")])
    tab = await stage_tab(stage, new_tab)
    assert "long ago" not in await tab.text("#tasks")
    await tab.page.click(".count[data-state=failed]")
    await tab.until("document.querySelectorAll('#tasks tr').length === 1")
    assert "long ago" in await tab.text("#tasks")
    assert await tab.page.get_attribute(".count[data-state=failed]", "aria-pressed") == "true"
    await tab.page.click(".count[data-state=failed]")
    await tab.until("document.querySelectorAll('#tasks tr').length === 200")


@pytest.mark.slow  # a browser takes its time
async def test_paused_decisions_stand_still(stage, new_tab):
    stage.model.add_decisions([decision(2)])
    tab = await stage_tab(stage, new_tab)
    await tab.page.click("#decisions-pause")
    stage.model.add_decisions([decision(1, reason="meanwhile")])
    await tab.until("document.getElementById('decisions-pause').textContent === 'Go on (1 new)'")
    assert "meanwhile" not in await tab.text("#decisions")
    await tab.page.click("#decisions-pause")
    assert "meanwhile" in await tab.text("#decisions")


async def test_what_is_old_is_seen_to_be_old(stage, new_tab):
    stage.model.add_records([record(1)])
    tab = await stage_tab(stage, new_tab)
    assert await tab.page.locator("[data-stale]").count() == 0
    stage.model.source_failed("broker", "the control role is away")
    await tab.page.wait_for_selector(".tasks-panel[data-stale]")
    assert "No broker. the control role is away" in await tab.text("#troubles")
    assert await tab.page.locator(".decisions-panel[data-stale]").count() == 0
    stage.model.source_well("broker")
    await tab.page.wait_for_selector(".tasks-panel:not([data-stale])")


@pytest.mark.slow  # a browser takes its time
async def test_a_console_that_comes_back_is_found_again_and_nothing_is_fresh_meanwhile(new_tab):
    stage = Stage()
    async with stage.open():
        stage.model.add_records([record(1)])
        tab = await stage_tab(stage, new_tab)
        await tab.until("document.getElementById('link').dataset.link === 'live'")
        tab.may_be_away = True
    await tab.page.wait_for_selector(".tasks-panel[data-stale]")
    assert "The console does not answer." in await tab.text("#troubles")
    assert await tab.text("#link") == "reconnecting"
    async with stage.open():
        await tab.page.wait_for_selector(".tasks-panel:not([data-stale])")
        assert await tab.text("#troubles") == ""
        stage.model.add_records([record(0, TaskState.WORKING)])
        await tab.page.wait_for_selector("#tasks [data-state=working]")


@pytest.mark.slow  # a browser takes its time
async def test_a_console_that_was_started_anew_says_how_to_open_it(new_tab):
    first, second = Stage(), Stage()
    async with first.open():
        tab = await stage_tab(first, new_tab)
        tab.may_be_away = True
    second._port = first._port
    async with second.open():
        await tab.page.wait_for_selector("#link[data-link=ended]")
        assert "Open the address that it has printed." in await tab.text("#troubles")


CUT_LABELS = """[...document.querySelectorAll(".count .label")]
    .filter((one) => one.scrollWidth > one.clientWidth).map((one) => one.textContent)"""


@pytest.mark.slow  # a browser takes its time
async def test_the_page_fits_from_a_phone_to_a_wall(stage, new_tab):
    long = "x" * 180
    agent = f"{AGENT}-{long}"
    stage.model.add_records(
        [
            record(
                1, TaskState.FAILED, agent=agent, capability=f"do_{long}", id=long, message=long, sender=agent
            )
        ]
    )
    stage.model.add_decisions([decision(1, allowed=False, caller=agent, callee=agent, reason=long)])
    stage.model.set_letters([letter(1, reason=long)], more=False)
    stage.model.set_workers([worker(1, agent=long, name=long, state="waiting", why=long)])
    stage.model.source_failed("workers", long)
    tab = await stage_tab(stage, new_tab)
    for width in (360, 700, 900, 1080, 1400, 1900, 2560):
        await tab.page.set_viewport_size({"width": width, "height": 900})
        assert await tab.page.evaluate("document.documentElement.scrollWidth") <= width
        assert await tab.page.evaluate(CUT_LABELS) == []
    await tab.page.evaluate("(key) => { location.hash = `#/task/${key}`; }", key_of(1))
    await tab.page.wait_for_selector("#story .facts")
    for width in (360, 1080):
        await tab.page.set_viewport_size({"width": width, "height": 900})
        assert await tab.page.evaluate(
            "document.getElementById('story').scrollWidth <= document.getElementById('story').clientWidth"
        )


async def stage_tab(stage, new_tab):
    return await new_tab(stage.url)
