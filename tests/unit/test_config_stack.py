"""The file of a whole stack."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agentweave_bus.config import load_config, load_stack
from agentweave_bus.exceptions import ConfigurationError


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AGENTWEAVE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def refusal(tmp_path: Path, text: str) -> ConfigurationError:
    path = tmp_path / "stack.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_stack(path)
    return caught.value


def test_without_a_file_there_is_an_empty_stack() -> None:
    stack = load_stack()
    assert stack.agents == ()
    assert stack.clients == ("cli",)
    assert stack.trust_domain == "agentweave.local"
    assert stack.state_dir == Path(".agentweave")
    assert stack.bus.port == 0
    assert stack.grants is None


def test_the_file_of_this_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "agentweave.yaml").write_text("trust_domain: here.io\n")
    assert load_stack().trust_domain == "here.io"


def test_files_are_relative_to_the_stack_file(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "stack.yaml").write_text(
        """
trust_domain: agentweave.io
agents:
  - config: order.yaml
    class: shop.order:OrderAgent
    replicas: 2
  - {config: /abs/user.yaml}
grants: grants.yaml
clients: [cli, batch]
observability: {logging: {format: text}}
"""
    )
    stack = load_stack("shop/stack.yaml")
    assert [agent.config for agent in stack.agents] == [folder / "order.yaml", Path("/abs/user.yaml")]
    assert [agent.class_ for agent in stack.agents] == ["shop.order:OrderAgent", None]
    assert [agent.replicas for agent in stack.agents] == [2, 1]
    assert stack.grants == folder / "grants.yaml"
    assert stack.clients == ("cli", "batch")
    assert stack.observability.logging.format == "text"
    assert stack.state_dir == Path(".agentweave")


def test_variables_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTWEAVE_STACK__BUS__PORT", "4333")
    assert load_stack().bus.port == 4333
    monkeypatch.setenv("AGENTWEAVE_STACK__BUS__PRT", "4333")
    with pytest.raises(ConfigurationError, match=r"AGENTWEAVE_STACK__BUS__PRT: .* 'bus\.port'"):
        load_stack()


def test_a_stack_and_its_agents_share_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTWEAVE_STACK__BUS__PORT", "4333")
    monkeypatch.setenv("AGENTWEAVE_BUS__CALL_TIMEOUT", "7")
    assert load_stack().bus.port == 4333
    assert load_config(overrides={"agent": {"name": "a", "trust_domain": "b.io"}}).bus.call_timeout == 7


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("agnets: []", "agnets", "Did you mean 'agents'?"),
        ("agents: [{config: a.yaml, replica: 2}]", "agents[0].replica", "Did you mean 'agents[].replicas'?"),
        ("agents: [{config: a.yaml}, {config: ./a.yaml}]", "agents", "listed twice"),
        ("agents: [{config: a.yaml, replicas: 0}]", "agents[0].replicas", "greater than or equal to 1"),
        ("agents: [{}]", "agents[0].config", "is missing"),
        ("agents: [{config: a.yaml, min: 2}]", "agents[0]", "min and max belong together"),
        ("agents: [{config: a.yaml, min: 3, max: 2}]", "agents[0]", "min (3) is more than max (2)"),
        ("agents: [{config: a.yaml, replicas: 1, min: 1, max: 2}]", "agents[0]", "not both"),
        ("agents: [{config: a.yaml, scale: {backlog: 3}}]", "agents[0]", "scale needs min and max"),
        ("agents: [{config: a.yaml, min: 1, max: 2, scale: {backlog: 0}}]", "agents[0].scale.backlog", "1"),
        ("grants: a.yaml\npolicies: b", None, "not both"),
        ("trust_domain: UPPER", "trust_domain", "lower-case"),
        ("clients: ['a/b']", "clients[0]", "letters"),
    ],
)
def test_refusals_name_the_key(tmp_path: Path, text: str, key: str | None, says: str) -> None:
    error = refusal(tmp_path, text)
    assert error.key == key
    assert says in str(error)
    assert "stack.yaml" in str(error)


def test_a_named_file_that_is_missing_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="can't be read"):
        load_stack("nowhere.yaml")
