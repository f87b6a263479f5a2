"""``docs/configuration.md`` names every key that exists, none that does not, its type and its default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from agentweave_bus.config import (
    AgentConfig,
    ControlConfig,
    IdentityConfig,
    ObservabilityConfig,
    StackConfig,
    load_config,
)
from agentweave_bus.config.problems import known_keys
from agentweave_bus.exceptions import ConfigurationError
from tests.unit.settings_in_words import type_words

DOCUMENT = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
AGENT_PART, OTHERS = DOCUMENT.split("## An agent's keys")[1].split("## A stack's keys")
STACK_PART, CONTROL_PART = OTHERS.split("## A control role's keys")
TOP_LEVEL_SECTIONS = {"agent", "identity", "authorization", "transport", "bus", "observability"}


def rows(part: str) -> list[tuple[str, str, str]]:
    """Key, type and default of every key in a part of the page; each says something about its meaning."""
    found: list[tuple[str, str, str]] = re.findall(
        r"^\| `([^`]+)` \| (.*?) \| (.*?) \| .{4,} \|$", part, re.MULTILINE
    )
    assert len(found) == len({key for key, *_ in found}), "a key is documented twice"
    return found


def documented(part: str) -> dict[str, str]:
    return {key: default for key, _, default in rows(part)}


def model_keys(model: type[BaseModel], *, without: str = "") -> set[str]:
    return {key for key in known_keys(model) if not without or not key.startswith(f"{without}.")}


def test_every_key_of_an_agent_is_documented_and_every_documented_key_exists() -> None:
    headings = set(re.findall(r"^### (\w+):", AGENT_PART, re.MULTILINE))
    assert set(documented(AGENT_PART)) | headings == model_keys(AgentConfig)
    assert headings == TOP_LEVEL_SECTIONS | {"server"}


def test_every_key_of_a_stack_is_documented_and_every_documented_key_exists() -> None:
    assert set(documented(STACK_PART)) == model_keys(StackConfig, without="observability")
    assert StackConfig.model_fields["observability"].annotation is ObservabilityConfig


def test_every_key_of_a_control_role_is_documented_and_every_documented_key_exists() -> None:
    keys = {key for key in known_keys(ControlConfig) if not key.startswith(("identity.", "observability."))}
    assert set(documented(CONTROL_PART)) == keys
    assert ControlConfig.model_fields["identity"].annotation is IdentityConfig
    assert ControlConfig.model_fields["observability"].annotation is ObservabilityConfig


def field_of(model: type[BaseModel], key: str) -> tuple[type[BaseModel], str]:
    section, _, name = key.rpartition(".")
    owner = known_keys(model)[section.removesuffix("[]")] if section else model
    assert owner is not None
    return owner, next(own for own, field in owner.model_fields.items() if (field.alias or own) == name)


def default_of(model: type[BaseModel], key: str) -> Any:
    owner, name = field_of(model, key)
    return owner.model_fields[name].get_default(call_default_factory=True)


@pytest.mark.parametrize(
    ("model", "key", "shown"),
    [(AgentConfig, key, kind) for key, kind, _ in rows(AGENT_PART)]
    + [(StackConfig, key, kind) for key, kind, _ in rows(STACK_PART)]
    + [(ControlConfig, key, kind) for key, kind, _ in rows(CONTROL_PART)],
)
def test_the_documented_type_is_the_type(model: type[BaseModel], key: str, shown: str) -> None:
    assert shown == type_words(*field_of(model, key))


@pytest.mark.parametrize(
    ("key", "default"),
    [
        (key, default)
        for key, default in documented(AGENT_PART).items()
        if "[]" not in key and default.startswith("`") and not key.startswith("server")
    ],
)
def test_every_key_can_be_set_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, key: str, default: str
) -> None:
    """By the name that the page says how to build; a wrong value is refused under that name."""
    name = f"AGENTWEAVE_{key.upper().replace('.', '__')}"
    monkeypatch.setenv("AGENTWEAVE_AGENT__NAME", "billing")
    monkeypatch.setenv("AGENTWEAVE_AGENT__TRUST_DOMAIN", "acme-corp.io")
    monkeypatch.setenv(name, default.strip("`"))
    assert load_config(environment="production").agent.name == "billing"
    monkeypatch.setenv(name, "[{wrong: [true]}]")
    with pytest.raises(ConfigurationError, match=re.escape(name)):
        load_config(environment="production")


@pytest.mark.parametrize(
    ("model", "key", "shown"),
    [(AgentConfig, *row) for row in documented(AGENT_PART).items()]
    + [(StackConfig, *row) for row in documented(STACK_PART).items()]
    + [(ControlConfig, *row) for row in documented(CONTROL_PART).items()],
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
