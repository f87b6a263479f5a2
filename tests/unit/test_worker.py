"""The worker's entry point: what it runs, and what it says when it can't."""

from __future__ import annotations

import sys

import pytest

from agentweave_bus.config import load_config
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.worker import find_agent, main

CONFIG = {"agent": {"name": "x", "trust_domain": "a.test"}}


@pytest.fixture
def module(monkeypatch, tmp_path):
    """A module beside the working directory, as agents are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    (tmp_path / "my_agents_xyz.py").write_text(
        "from agentweave_bus import SecureAgent, capability\n"
        "class A(SecureAgent):\n"
        "    @capability('hello')\n"
        "    async def hello(self) -> dict:\n"
        "        return {}\n"
        "NUMBER = 3\n"
    )
    yield "my_agents_xyz"
    sys.modules.pop("my_agents_xyz", None)


def config(**agent):
    return load_config(overrides={"agent": CONFIG["agent"] | agent})


def test_a_class_is_given_the_configuration(module):
    agent = find_agent(config(**{"class": f"{module}:A"}))
    assert type(agent).__name__ == "A"
    assert agent.config.agent.name == "x"
    assert type(find_agent(config(), f"{module}:A")).__name__ == "A"
    assert type(find_agent(config(), f"{module}.py:A")).__name__ == "A"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (None, "not said which class"),
        ("my_agents_xyz:B", "has no 'B'"),
        ("my_agents_xyz:NUMBER", "is 3, not an agent"),
        ("nowhere_xyz:A", "nowhere_xyz"),
    ],
)
def test_what_is_no_agent_is_named(module, path, said):
    with pytest.raises(ConfigurationError, match=said) as error:
        find_agent(config(), path)
    assert error.value.key == "agent.class"
    assert error.value.hint


def test_wrong_configuration_ends_with_2_and_says_where(module, tmp_path, capsys):
    file = tmp_path / "agent.yaml"
    file.write_text("agent: {name: x, trust_domain: a.test, klass: y}\n")
    assert main([str(file)]) == 2
    assert "agent.klass" in capsys.readouterr().err
    file.write_text("agent: {name: x, trust_domain: a.test}\n")
    assert main([str(file)]) == 2
    assert "agent.class" in capsys.readouterr().err
