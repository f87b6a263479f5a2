"""docs/writing-an-agent.md says what is: its code runs, its table holds, its configuration fits."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from types import FunctionType
from typing import Any
from uuid import UUID

import anyio.to_thread
import pytest
import yaml

import agentweave_bus
from agentweave_bus.agent import RequestContext, bind_context
from agentweave_bus.agent.arguments import Arguments
from agentweave_bus.agent.capability import marks_of
from agentweave_bus.config import AgentConfig
from agentweave_bus.exceptions import (
    AgentCallError,
    AuthorizationError,
    CallRefusedError,
    CallTimeoutError,
    IdentityError,
    PayloadError,
    UnreachableError,
)
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.types import DataPart, Message, TaskResult

TEXT = (Path(__file__).parents[3] / "docs" / "writing-an-agent.md").read_text()
CALLER = "spiffe://acme-corp.io/agent/gateway"
TYPES = {"Decimal": Decimal, "datetime": datetime, "UUID": UUID, "Optional": typing.Optional}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Every python block of the page, run in order in one namespace as a reader would paste them."""
    namespace: dict[str, Any] = {"__name__": "writing_an_agent"}
    for block in blocks("python"):
        exec(compile(block, "writing-an-agent.md", "exec", dont_inherit=True), namespace)
    return namespace


def made(agent: type, **section: Any) -> Any:
    given = {"name": "pricing", "trust_domain": "acme-corp.io", **section}
    return agent(AgentConfig.model_validate({"agent": given}))


async def ask(agent: Any, name: str, payload: dict[str, Any]) -> TaskResult:
    bound = agent.capability_table[name]
    with bind_context(RequestContext(caller_spiffe_id=CALLER)):
        return await bound.invoke(bound.validate(payload))


@pytest.mark.anyio
async def test_the_first_agent_fits_its_configuration_and_answers(page: dict[str, Any]) -> None:
    agent = page["PricingAgent"](AgentConfig.model_validate(yaml.safe_load(blocks("yaml")[0])))
    assert agent.spiffe_id == "spiffe://acme-corp.io/agent/pricing"
    assert (await ask(agent, "quote", {"item": "w", "quantity": 2})).data == {
        "item": "w",
        "price": "39.98",
        "currency": "EUR",
    }


@pytest.mark.anyio
async def test_models_and_limits(page: dict[str, Any]) -> None:
    agent = made(page["StockAgent"])
    order = {"order_id": "o", "items": [{"sku": "w", "quantity": 3}, {"sku": "x"}]}
    assert (await ask(agent, "reserve_items", order)).data == {"order_id": "o", "reserved": 4}
    with pytest.raises(PayloadError, match=r"items\[0\]\.quantity"):
        await ask(agent, "reserve_items", {"order_id": "o", "items": [{"sku": "w", "quantity": 101}]})


@pytest.mark.anyio
async def test_both_ways_to_fail_tell_the_caller(page: dict[str, Any]) -> None:
    agent = made(page["UserAgent"])
    assert (await ask(agent, "get_user", {"user_id": "u-1"})).data == {"name": "Ada"}
    for name, payload in (("get_user", {"user_id": "?"}), ("rename_user", {"user_id": "?", "name": "x"})):
        result = await ask(agent, name, payload)
        assert (result.status, result.error) == ("failed", "User ? not found")


@pytest.mark.anyio
async def test_calling_another_agent(page: dict[str, Any]) -> None:
    class Connected:
        spiffe_id = SpiffeID("spiffe://acme-corp.io/agent/order")

        async def call(self, target: str, capability: str, payload: Any, **_: Any) -> TaskResult:
            data = {"asked": [target, capability, payload]}
            return TaskResult(status="completed", messages=[Message("assistant", [DataPart(data)])])

    agent = made(page["OrderAgent"])
    await agent.begin_serving(Connected())
    result = await ask(agent, "create_order", {"user_id": "u-1", "items": []})
    asked = ["spiffe://acme-corp.io/agent/user", "get_user", {"user_id": "u-1"}]
    assert result.data == {"user": {"asked": asked}}


def test_restrictions(page: dict[str, Any]) -> None:
    table = made(page["PaymentAgent"]).capability_table
    assert table["process_payment"].admits_peer("spiffe://other-partner.io/x") is None
    assert table["process_payment"].admits_peer("spiffe://evil.example/x")
    assert table["refund"].admits_peer("spiffe://acme-corp.io/support/team/ada") is None
    assert table["refund"].admits_peer(CALLER)


@pytest.mark.anyio
async def test_hooks(page: dict[str, Any]) -> None:
    agent = made(page["CachingAgent"])
    await agent.begin_serving(object())
    assert agent.cache == {}
    await agent.end_serving()
    assert "quote" in agent.capability_table


@pytest.mark.anyio
async def test_plain_functions(page: dict[str, Any]) -> None:
    assert marks_of(page["greet"]).spec.safe
    assert (await ask(page["agent"], "greet", {"name": "Ada"})).data == {
        "greeting": "Hello Ada",
        "from": CALLER,
    }


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (AuthorizationError("x", reason="no grant", audit_id="a-1"), "denied: no grant (agentweave why a-1)"),
        (CallRefusedError("x", step="payload", reason="'item' is missing"), "refused at payload: 'item' is"),
        (CallTimeoutError("x"), "no answer in time"),
        (UnreachableError("x"), "nobody received it"),
    ],
)
def test_a_script_tells_what_happened(page: dict[str, Any], error: Exception, says: str) -> None:
    def raising(_item: str) -> str:
        raise error

    assert isinstance(error, AgentCallError)
    price_or_reason = FunctionType(page["price_or_reason"].__code__, {**page, "price_of": raising})
    assert price_or_reason("w").startswith(says)


@pytest.mark.anyio
async def test_a_script_s_clients_take_a_file(page: dict[str, Any], tmp_path: Path) -> None:
    """How far it gets without a stack: to the Workload API that its file names."""
    file = tmp_path / "cli.yaml"
    file.write_text(
        "agent: {name: cli, trust_domain: acme-corp.io, path: client/cli}\n"
        f"identity: {{spiffe_endpoint: 'unix://{tmp_path}/none.sock'}}\n"
    )
    with pytest.raises(IdentityError, match="no Workload API"):
        await page["price_of_async"]("w", str(file))
    with pytest.raises(IdentityError, match="no Workload API"):
        await anyio.to_thread.run_sync(page["price_of"], "w", str(file))
    assert page["told"](TaskResult(status="failed", error="sold out")) == "no price: sold out"


def test_every_class_of_the_page_can_be_made(page: dict[str, Any]) -> None:
    secure = [
        value
        for value in page.values()
        if isinstance(value, type)
        and issubclass(value, agentweave_bus.SecureAgent)
        and value.__module__ == "writing_an_agent"
    ]
    assert len(secure) == 7
    for agent in secure:
        assert len(made(agent).capability_table) >= 2


def rows() -> Iterator[tuple[str, str, bool]]:
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[1].startswith("`"):
            annotation = cells[0].strip("`")
            for cell, taken in ((cells[1], True), (cells[2], False)):
                yield from ((annotation, value, taken) for value in re.findall(r"`([^`]+)`", cell))


def test_the_table_is_there() -> None:
    assert len(list(rows())) > 25


@pytest.mark.parametrize(("annotation", "value", "taken"), list(rows()))
def test_the_table_holds(annotation: str, value: str, *, taken: bool) -> None:
    def probe(x): ...

    probe.__annotations__ = {"x": eval(annotation, dict(TYPES))}
    made = Arguments("probe", probe)
    payload = {"x": json.loads(value)}
    if taken:
        made.validate(payload)
    else:
        with pytest.raises(PayloadError):
            made.validate(payload)


def test_every_attribute_of_the_request_exists() -> None:
    section = TEXT.split("## The request")[1].split("## ")[0]
    named = [
        name
        for line in section.splitlines()
        if line.startswith("| `")
        for name in line.split("|")[1].split(",")
    ]
    context = RequestContext(caller_spiffe_id=CALLER)
    for name in named:
        assert hasattr(context, name.strip(" `()")), name
    assert len(named) == 12
