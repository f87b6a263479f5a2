"""``docs/configuration.md`` names every key that exists, none that does not, and its default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from agentweave_bus.config import AgentConfig, ObservabilityConfig, StackConfig, load_config
from agentweave_bus.config.problems import known_keys

DOCUMENT = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
AGENT_PART, STACK_PART = DOCUMENT.split("## An agent's keys")[1].split("## A stack's keys")
TOP_LEVEL_SECTIONS = {"agent", "identity", "authorization", "transport", "bus", "observability"}


def documented(part: str) -> dict[str, str]:
    rows = re.findall(r"^\| `([^`]+)` \| (.*?) \| .+ \|$", part, re.MULTILINE)
    assert len(rows) == len({key for key, _ in rows}), "a key is documented twice"
    return dict(rows)


def model_keys(model: type[BaseModel], *, without: str = "") -> set[str]:
    return {key for key in known_keys(model) if not without or not key.startswith(f"{without}.")}


def test_every_key_of_an_agent_is_documented_and_every_documented_key_exists() -> None:
    headings = set(re.findall(r"^### (\w+):", AGENT_PART, re.MULTILINE))
    assert set(documented(AGENT_PART)) | headings == model_keys(AgentConfig)
    assert headings == TOP_LEVEL_SECTIONS | {"server"}


def test_every_key_of_a_stack_is_documented_and_every_documented_key_exists() -> None:
    assert set(documented(STACK_PART)) == model_keys(StackConfig, without="observability")
    assert StackConfig.model_fields["observability"].annotation is ObservabilityConfig


def default_of(model: type[BaseModel], key: str) -> Any:
    section, _, name = key.rpartition(".")
    owner = known_keys(model)[section.removesuffix("[]")] if section else model
    assert owner is not None
    field = next(field for own, field in owner.model_fields.items() if (field.alias or own) == name)
    return field.get_default(call_default_factory=True)


@pytest.mark.parametrize(
    ("model", "key", "shown"),
    [(AgentConfig, *row) for row in documented(AGENT_PART).items()]
    + [(StackConfig, *row) for row in documented(STACK_PART).items()],
)
def test_the_documented_default_is_the_default(model: type[BaseModel], key: str, shown: str) -> None:
    default = default_of(model, key)
    if shown == "required":
        assert default is PydanticUndefined
    elif shown in {"see below", "as an agent's"}:
        assert isinstance(default, BaseModel)
        assert default == type(default)()
    elif shown.startswith("from "):
        assert default in (None, "", ())  # filled in from other keys; see test_config.py
    else:
        value = yaml.safe_load(shown.strip("`"))
        assert to_jsonable_python(default) == value
        assert type(to_jsonable_python(default)) is type(value)


def test_the_minimal_file_of_the_page_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
    path = tmp_path / "agent.yaml"
    path.write_text(example)
    assert load_config(path, environment="production").agent.name == "billing"
