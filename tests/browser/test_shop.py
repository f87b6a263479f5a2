"""The page on the running example: six agents as processes, orders as durable tasks, and a broker that restarts."""

from __future__ import annotations

import pytest

from workers.ecommerce.demo.stage import PRINCIPAL, open_stage
from workers.ecommerce.directory import ORDER

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

TWO_WIDGETS = {
    "items": [{"sku": "WIDGET-001", "quantity": 2, "price": "19.99"}],
    "payment_method": "credit_card",
}


@pytest.fixture(scope="module")
async def shop(anyio_backend, tmp_path_factory):
    async with open_stage(tmp_path_factory.mktemp("shop")) as stage:
        yield stage


async def test_an_order_shows_and_after_the_broker_was_away_another(shop, new_tab):
    made = await shop.route("user", "create_user", {"email": "alice@shop.example", "name": "Alice"})

    async def ordered():
        wanted = {"user_id": made.data["user_id"], **TWO_WIDGETS}
        return await shop.web.submit(ORDER, "create_order", wanted, principal=PRINCIPAL)

    tab = await new_tab(shop.console.url)
    await tab.until("document.querySelectorAll('#agents article').length === 6")
    assert "6 of 6 replicas ready" in await tab.text("#agents-note")
    first = await ordered()
    row = f"#tasks tr:has([title='{first.id}'])"
    await tab.page.wait_for_selector(f"{row}[data-state=completed]")
    await tab.page.click(f"{row} .what")
    await tab.page.wait_for_selector("#story .timeline [data-kind=outcome]")
    assert await tab.text("#story .chain") == "alice acts by client/web create_order agent/order"
    told = await tab.text("#story .timeline")
    for asked in ("user: get_user", "inventory: reserve_items", "payment: process_payment"):
        assert f"Asked {asked}" in told
    await tab.page.keyboard.press("Escape")
    nats = shop.local.stack.nats
    await nats.kill()
    await tab.page.wait_for_selector(".tasks-panel[data-stale]")
    await nats.start()
    await tab.page.wait_for_selector(".tasks-panel:not([data-stale])")
    second = await ordered()
    await tab.page.wait_for_selector(f"#tasks tr[data-state=completed]:has([title='{second.id}'])")
