"""docs/durable-tasks.md, "In the agent": its code runs, and its tables hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus.agent import bind_context
from agentweave_bus.agent.steps import MOST_PASSES
from agentweave_bus.config import AgentConfig
from agentweave_bus.exceptions import (
    AuthorizationError,
    CallRefusedError,
    CallTimeoutError,
    PayloadError,
    RetryableError,
    TaskFailedError,
    UnreachableError,
)
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.types import DataPart, Message, TaskResult
from tests.unit.agent.step_store import Crash, MemoryStore, attempt, task

TEXT = (Path(__file__).parents[3] / "docs" / "durable-tasks.md").read_text()
SECTION = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1]
ERRORS = [
    TaskFailedError("x"),
    AuthorizationError("x"),
    PayloadError("x"),
    CallTimeoutError("x"),
    UnreachableError("x"),
    CallRefusedError("x", retry_after=1),
    RetryableError("x", retry_after=1),
]

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    assert SECTION.startswith("In the agent")
    namespace: dict[str, Any] = {"__name__": "durable_tasks"}
    for block in re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL):
        exec(compile(block, "durable-tasks.md", "exec", dont_inherit=True), namespace)
    return namespace


def made(agent: type) -> Any:
    return agent(AgentConfig.model_validate({"agent": {"name": "order", "trust_domain": "acme-corp.io"}}))


class Others:
    """The agents that an order needs; ``declined`` is what payment says, ``dies`` where the worker does."""

    spiffe_id = SpiffeID("spiffe://acme-corp.io/agent/order")

    def __init__(self, *, declined: bool = False) -> None:
        self.asked: list[str] = []
        self.declined = declined

    async def call(self, target: str, capability: str, payload: Any, **_: Any) -> TaskResult:
        self.asked.append(capability)
        if capability == "charge" and self.declined:
            return TaskResult(status="failed", error="declined")
        return TaskResult("completed", [Message("assistant", [DataPart({"id": f"{capability}-1"})])])


async def order(page: dict[str, Any], others: Others, store: MemoryStore | None, number: int = 1) -> Any:
    agent = made(page["OrderAgent"])
    await agent.begin_serving(others)
    bound = agent.capability_table["create_order"]
    call = bound.validate({"order_id": "o-1", "sku": "w", "amount": "9.99"})
    with bind_context(task(number)):
        if store is None:
            return await bound.invoke(call)
        return await bound.attempt(call, last_attempt=False, store=store)


async def test_an_order_that_dies_behind_the_charge_does_not_charge_twice(page: dict[str, Any]) -> None:
    others, store = Others(), MemoryStore(4)  # two steps are announced and recorded: right behind the last
    with pytest.raises(Crash):
        await order(page, others, store)
    outcome = await order(page, others, store, 2)
    assert outcome.result.data == {"order_id": "o-1", "reservation": "reserve-1", "transaction": "charge-1"}
    assert others.asked == ["reserve", "charge"]


@pytest.mark.parametrize("durable", [True, False])
async def test_an_order_that_is_declined_releases_the_stock(page: dict[str, Any], durable: bool) -> None:
    others = Others(declined=True)
    outcome = await order(page, others, MemoryStore() if durable else None)
    assert getattr(outcome, "result", outcome).error == "declined"
    assert others.asked == ["reserve", "charge", "release"]


async def test_the_till_is_tried_again(page: dict[str, Any]) -> None:
    agent = made(page["TillAgent"])
    bound = agent.capability_table["pay"]
    assert bound.retry.attempts == 10
    with bind_context(task(4)):
        outcome = await bound.attempt(bound.validate({"amount": "1.00"}), last_attempt=False)
    assert (outcome.retry, outcome.retry_after) == (True, 30)
    assert outcome.result.error == "the till is closed at attempt 4"


async def test_the_report_tells_of_each_month(page: dict[str, Any]) -> None:
    told: list[Any] = []

    class Sink:
        async def progress(self, fraction: float, message: str) -> None:
            told.append((fraction, message))

        async def artifact(self, artifact: Any) -> None:
            told.append(artifact["name"])

    agent = made(page["ReportAgent"])
    bound = agent.capability_table["report"]
    with bind_context(task()):
        outcome = await bound.attempt(
            bound.validate({"months": ["may", "june"]}), last_attempt=True, store=MemoryStore(), sink=Sink()
        )
    assert outcome.result.data == {"months": 2}
    assert told == ["may", (0.5, "may is done"), "june", (1.0, "june is done")]


def rows() -> list[list[str]]:
    table = SECTION.split("### Trying again")[1].split("### ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_the_table_of_retries_holds(error: Exception) -> None:
    (row,) = [row for row in rows() if type(error).__name__ in row[0]]

    async def handler() -> None:
        raise error

    assert (await attempt(handler)).retry == row[1].startswith("tried again")
    assert row[1].startswith(("tried again", "fails"))


def test_the_page_names_the_passes() -> None:
    assert f"up to {MOST_PASSES} times" in SECTION
