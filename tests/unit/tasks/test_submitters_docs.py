"""docs/durable-tasks.md, "For who submits": its code runs, and its tables name what there is."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus import SecureAgent, TaskHandle, TaskStatus, capability
from agentweave_bus.exceptions import TaskFailedError
from agentweave_bus.testing import MemoryBus
from agentweave_bus.types import TaskState

TEXT = (Path(__file__).parents[3] / "docs" / "durable-tasks.md").read_text()
SECTION = next(
    part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE) if part.startswith("For who submits")
)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "durable_tasks"}
    for block in re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL):
        exec(compile(block, "durable-tasks.md", "exec", dont_inherit=True), namespace)
    return namespace


class OrderAgent(SecureAgent):
    """Takes orders, as the page's other half does."""

    @capability("create_order")
    async def create_order(self, order_id: str, amount: Decimal = Decimal(1)) -> dict[str, Any]:
        """Tell of progress, and be paid unless it is too much."""
        await self.context.progress(0.5, "stock is reserved")
        await self.context.artifact("receipt", {"order": order_id}, name="receipt")
        if amount > 100:
            raise TaskFailedError("declined")
        return {"transaction": f"t-{order_id}"}


@pytest.mark.anyio
async def test_the_code_runs(bus: MemoryBus, page: dict[str, Any]) -> None:
    await bus.grant("client/cli", "agent/order", "create_order")
    await bus.start(OrderAgent)
    client = await bus.client("client/cli")
    page["ORDERS"] = str(bus.id("agent/order"))
    paid = await page["place"](client, {"order_id": "o-1", "amount": 5})
    assert await page["outcome"](client, paid) == "t-o-1"
    assert await page["place"](client, {"order_id": "o-1", "amount": 5}) == paid
    assert await page["follow"](client, paid) == [
        *("working", "50% stock is reserved", "receipt", "completed")
    ]
    declined = await page["place"](client, {"order_id": "o-2", "amount": 500})
    assert await page["outcome"](client, declined) == "failed: declined"
    events = [event async for event in client.task(paid).events()]
    assert await page["follow"](client, paid, events[1].cursor) == ["receipt", "completed"]


def test_the_table_of_a_handle_names_all_that_it_has() -> None:
    rows = SECTION.partition("### The handle")[2].partition("A reference is")[0]
    named = set(
        re.findall(r"`(?:await )?([a-z_]+)[(`]", "".join(re.findall(r"^\| (.*?) \|", rows, re.MULTILINE)))
    )
    assert named == {name for name in vars(TaskHandle) if not name.startswith("_")}


def test_all_of_a_status_is_named() -> None:
    row = re.search(r"^\| `await status\(\)` \| (.*) \|$", SECTION, re.MULTILINE)
    assert row is not None
    assert re.findall(r"`([a-z_]+)`", row[1]) == list(TaskStatus.__dataclass_fields__)


def test_every_state_is_in_the_table() -> None:
    rows = SECTION.partition("| state | `result()` |")[2].partition("\n\n")[0]
    named = re.findall(r"`([a-z_]+)`", "".join(re.findall(r"^\| (.*?) \|", rows, re.MULTILINE)))
    assert {one for one in named if one != "retry_at"} == {state.value for state in TaskState}
