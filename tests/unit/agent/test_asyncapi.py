"""AsyncAPI documents: valid by the official schema, and true of the agents that they describe.

``tests/vectors/asyncapi-3.0.0.json.gz`` is ``schemas/3.0.0.json`` of the npm package ``@asyncapi/specs`` 6.11.1
as its authors, the AsyncAPI Initiative, publish it under the Apache License 2.0.
"""

from __future__ import annotations

import gzip
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from jsonschema import Draft7Validator
from pydantic import BaseModel, Field

from agentweave_bus import SecureAgent, TaskResult, capability, on_event
from agentweave_bus.agent.asyncapi import describe_agent
from agentweave_bus.bus.subjects import (
    Priority,
    call_subject,
    control_subject,
    event_subject,
    parse_subject,
    progress_subject,
    record_subject,
    reply_subject,
    task_subject,
)
from agentweave_bus.cli import main
from agentweave_bus.config import AgentConfig
from agentweave_bus.envelope import decode_payload
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.progress import ArtifactBody, ProgressBody
from agentweave_bus.tasks.record import RecordBody
from agentweave_bus.types import DataPart, Message, TaskState, TextPart

ROOT = Path(__file__).parents[3]
SHOP = ROOT / "workers" / "ecommerce"
OFFICIAL = Draft7Validator(
    json.loads(gzip.decompress((ROOT / "tests" / "vectors" / "asyncapi-3.0.0.json.gz").read_bytes()))
)
ME = SpiffeID("spiffe://shop.test/agent/desk.one")
CALLER = SpiffeID("spiffe://partner.example/client/web.eu")
KEY = "0a" * 32


class Line(BaseModel):
    sku: Annotated[str, Field(pattern="^[A-Z]+$")]
    count: int = 1
    parts: list[Line] = []


@dataclass
class Size:
    pair: tuple[int, str]
    unit: Literal["cm", "in"] = "cm"


class DeskAgent(SecureAgent):
    @capability("order", description="Takes an order")
    async def order(self, lines: list[Line], total: Decimal, size: Size | None = None) -> dict[str, Any]:
        return {}

    @capability("any-thing")
    async def any_thing(self, **given: int) -> None:
        """Take whatever comes."""

    @on_event("order.paid")
    async def paid(self, order_id: str) -> None:
        pass

    @on_event("order.*", durable=False, replicas="every")
    async def seen(self, **data: object) -> None:
        pass

    @on_event("stock.*", ordered=True)
    async def stock(self, sku: str, left: int) -> None:
        pass

    @on_event("stock.*", durable=False)
    async def stock_live(self, sku: str) -> None:
        pass

    @on_event("*", durable=False)
    async def everything(self, **data: object) -> None:
        pass


def desk(**section: Any) -> SecureAgent:
    about = {"name": "desk", "trust_domain": "shop.test", "path": "agent/desk.one", **section}
    servers = ["tls://one.test:4222", "tls://two.test:4333"]
    return DeskAgent(AgentConfig.model_validate({"agent": about, "bus": {"servers": servers}}))


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return describe_agent(desk())


def mistakes(document: Any) -> list[str]:
    return [f"{list(one.absolute_path)}: {one.message}" for one in OFFICIAL.iter_errors(document)]


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "$ref" and isinstance(value, str):
                yield value
            else:
                yield from references(value)
    elif isinstance(part, list):
        for one in part:
            yield from references(one)


def resolved(document: Any, reference: str) -> Any:
    found = document
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return found


def fits(document: dict[str, Any], message: str, payload: Any) -> bool:
    reference = document["components"]["messages"][message]["payload"]["$ref"]
    schema = {"$ref": reference, "components": document["components"]}
    return Draft7Validator(schema).is_valid(payload)


def address(document: dict[str, Any], channel: str, **values: str) -> str:
    found = document["channels"][channel]
    assert set(found.get("parameters", {})) == set(values)
    return str(found["address"]).format(**values)


# --- the form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["user", "order", "payment", "inventory", "gateway", "admin"])
def test_the_shops_documents_are_valid(name: str) -> None:
    agent = importlib.import_module(f"workers.ecommerce.{name}")
    kind = next(
        one for one in vars(agent).values() if isinstance(one, type) and one.__name__ == agent.__all__[0]
    )
    assert mistakes(describe_agent(kind.from_config(SHOP / f"{name}.yaml"))) == []


def test_it_is_valid_and_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    assert mistakes(document) == []
    found = set(references(document))
    assert {one for one in found if resolved(document, one) is None} == set()
    for name, message in document["components"]["messages"].items():
        assert message["name"] == name


@pytest.mark.parametrize(
    "break_it",
    [
        lambda it: it.pop("info"),
        lambda it: it["channels"]["records"].update(adress="x"),
        lambda it: it["operations"]["call.order"].update(action="get"),
        lambda it: it["components"]["schemas"]["arguments.order"].update(type="objekt"),
        lambda it: it["components"]["securitySchemes"]["svid"].update(type="SVID"),
        lambda it: it["operations"]["call.order"]["bindings"]["nats"].update(queue=7),
    ],
)
def test_the_official_schema_finds_mistakes(break_it: Any) -> None:
    document = json.loads(json.dumps(describe_agent(desk())))
    break_it(document)
    assert mistakes(document)


def test_its_version_is_that_of_the_interface() -> None:
    class Wider(DeskAgent):
        @capability("more")
        async def more(self) -> None:
            pass

    said = describe_agent(desk())
    assert describe_agent(desk(description="Other words."))["info"]["version"] == said["info"]["version"]
    assert describe_agent(Wider(desk().config))["info"]["version"] != said["info"]["version"]
    assert (said["id"], said["info"]["title"]) == (str(ME), "desk")


class Clerk(DeskAgent):
    """Sits at the desk.

    Takes orders:
      in a list.
    """


class Heir(Clerk):
    pass


@pytest.mark.parametrize(
    ("agent", "configured", "said"),
    [
        (DeskAgent, "", "Agent desk."),
        (Clerk, "", "Sits at the desk.\n\nTakes orders:\n  in a list."),
        (Heir, "", "Sits at the desk.\n\nTakes orders:\n  in a list."),
        (Clerk, "As configured.", "As configured."),
    ],
)
def test_it_is_described_as_configured_or_by_its_docstring(
    agent: type[SecureAgent], configured: str, said: str
) -> None:
    document = describe_agent(agent(desk(description=configured).config))
    assert document["info"]["description"] == said
    assert not mistakes(document)


def test_servers_that_are_not_configured_are_said_to_be_the_default() -> None:
    config = AgentConfig.model_validate({"agent": {"name": "desk", "trust_domain": "shop.test"}})
    document = describe_agent(DeskAgent(config))
    (server,) = document["servers"].values()
    assert server["host"] == "127.0.0.1:4222"
    assert "it is the default" in server["description"]
    assert not mistakes(document)
    configured = describe_agent(desk())["servers"].values()
    assert not any("default" in one["description"] for one in configured)


# --- what it says ---------------------------------------------------------------------------------------


def test_addresses_are_the_subjects_on_which_it_travels(document: dict[str, Any]) -> None:
    caller = {"domain": "partner=example", "caller": "client/web=eu"}
    slots = {"domain": "partner=example", "submitter": "client/web=eu", "key": KEY, "number": "3"}
    publisher = {"domain": "partner=example", "publisher": "client/web=eu"}
    instance, number = "A" * 22, "0199-x"
    for name in ("order", "any-thing", "health"):
        assert address(document, f"call.{name}") == call_subject(ME, name)
        queues = document["channels"][f"task.{name}"]["parameters"]["queue"]["enum"]
        told = [address(document, f"task.{name}", queue=queue) for queue in queues]
        assert told == [task_subject(ME, name, priority) for priority in Priority]
    assert address(document, "answers", **caller, instance=instance, id=number) == reply_subject(
        CALLER, instance, number
    )
    assert address(document, "records", **slots) == record_subject(ME, CALLER, KEY, 3)
    assert address(document, "progress", **slots) == progress_subject(ME, CALLER, KEY, 3)
    for verb in ("cancel", "approve", "reject"):
        assert address(document, f"control.{verb}") == control_subject(ME, verb)
    assert address(document, "event.order.paid", **publisher) == event_subject(CALLER, "order.paid")
    below = address(document, "event.stock.all", **publisher)
    assert below.replace(">", "low") == event_subject(CALLER, "stock.low")
    assert parse_subject(below.replace(">", "x")).agent == CALLER


def test_events_are_those_that_it_hears(document: dict[str, Any]) -> None:
    told = {
        name: one["description"].rpartition("; ")[2]
        for name, one in document["channels"].items()
        if name.startswith("event.")
    }
    assert told == {
        "event.order.paid": "durable.",
        "event.order.all": "while it runs, by every replica.",
        "event.stock.all": "durable, one at a time in their order.",
        "event.stock.all-live": "while it runs.",
        "event.all": "while it runs.",
    }


def test_each_capability_is_called_and_submitted_and_answers(document: dict[str, Any]) -> None:
    operations = document["operations"]
    for name in ("order", "any-thing", "health"):
        call, task = operations[f"call.{name}"], operations[f"task.{name}"]
        assert call["bindings"] == {"nats": {"queue": "replicas", "bindingVersion": "0.1.0"}}
        assert call["reply"]["channel"] == {"$ref": "#/channels/answers"}
        assert task["reply"]["channel"] == {"$ref": "#/channels/records"}
    assert operations["call.order"]["summary"] == "Takes an order"
    assert [one["host"] for one in document["servers"].values()] == ["one.test:4222", "two.test:4333"]
    for server in document["servers"].values():
        assert [resolved(document, one["$ref"])["type"] for one in server["security"]] == ["X509"]


@pytest.mark.parametrize("kind", ["call", "task"])
def test_schemas_of_arguments_take_what_the_agent_takes(document: dict[str, Any], kind: str) -> None:
    bound = desk().capability_table["order"]
    line = {"sku": "A", "count": 2, "parts": [{"sku": "B"}]}
    good = {"lines": [line], "total": "12.50", "size": {"pair": [3, "x"], "unit": "in"}}
    bound.validate(good)
    assert fits(document, f"{kind}.order", good)
    for wrong in (
        {**good, "lines": [{"sku": "a"}]},
        {**good, "lines": [{"sku": "A", "parts": [{"sku": 1}]}]},
        {**good, "size": {"pair": ["x", 3]}},
        {**good, "size": {"pair": [3, "x", 4]}},
        {**good, "size": {"pair": [3, "x"], "unit": "m"}},
        {**good, "more": 1},
        {"lines": []},
    ):
        with pytest.raises(Exception, match="order: "):
            bound.validate(wrong)
        assert not fits(document, f"{kind}.order", wrong), wrong
    assert fits(document, f"{kind}.any-thing", {"x": 1})
    assert (
        document["components"]["messages"][f"{kind}.order"]["contentType"] == document["defaultContentType"]
    )


def test_schemas_of_answers_take_what_is_answered(document: dict[str, Any]) -> None:
    parts = [DataPart({"total": 3}), TextPart("done")]
    result = TaskResult(status="completed", messages=[Message(role="assistant", parts=parts)])
    for one in (result, TaskResult(status="failed", error="no")):
        assert fits(document, "result", one.to_json())
        assert fits(document, "result", one.to_json(full=True))
    assert not fits(document, "result", {"status": "degraded"})
    assert fits(document, "refusal", {"step": "replay", "reason": "x", "audit_id": "a-1", "retry_after": 0.5})
    record = RecordBody(state=TaskState.COMPLETED, pd=KEY, result=result.to_json())
    assert fits(document, "record", decode_payload(record.encoded()))
    assert not fits(document, "record", {"state": "done", "pd": KEY})
    for progress in (
        ProgressBody(attempt=1, fraction=0.5, message="half"),
        ProgressBody(attempt=2, artifact=ArtifactBody(type="rows", data=[1], name="a")),
    ):
        assert fits(document, "progress", progress.model_dump(mode="json", exclude_none=True))
    assert not fits(document, "progress", {"attempt": 1, "fraction": 2})


# --- the command ----------------------------------------------------------------------------------------


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    printed = []
    for form in ([], ["--json"], ["--yaml"]):
        assert main(["agents", "asyncapi", str(SHOP / "order.yaml"), *form]) == 0
        printed.append(capsys.readouterr().out)
    in_a_pipe, as_json, as_yaml = printed
    assert in_a_pipe == as_json
    assert not as_yaml.startswith("{")
    assert "&id" not in as_yaml
    assert yaml.safe_load(as_yaml) == json.loads(as_json)
    assert mistakes(json.loads(as_json)) == []
    assert "task.create_order" in json.loads(as_json)["channels"]


def test_another_class_and_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "thing.yaml"
    file.write_text("agent: {name: thing, trust_domain: shop.test}\n")
    assert main(["agents", "asyncapi", str(file)]) == 2
    assert "--class" in capsys.readouterr().err
    (tmp_path / "thing_of_asyncapi.py").write_text(
        "from agentweave_bus import SecureAgent, capability\n"
        "class Thing(SecureAgent):\n"
        "    @capability('turn')\n"
        "    async def turn(self, degrees: int) -> None: ...\n"
    )
    assert main(["agents", "asyncapi", str(file), "--class", "thing_of_asyncapi:Thing"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["operations"]) >= {"call.turn", "task.turn", "call.health"}
    assert mistakes(document) == []
