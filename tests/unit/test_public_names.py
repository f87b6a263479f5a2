"""The package's public names come when they are used, and with them what makes an agent run."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import agentweave_bus


@pytest.mark.parametrize("name", agentweave_bus.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(agentweave_bus, name)
    home = importlib.import_module(value.__module__)
    assert getattr(home, name) is value
    assert name in dir(agentweave_bus)


def test_another_name_is_not() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'SecretAgent'"):
        _ = agentweave_bus.SecretAgent


def fresh(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def test_taking_an_agent_brings_its_runner() -> None:
    code = (
        "from agentweave_bus import Agent\nfrom agentweave_bus.agent.agent import _Hook\nprint(_Hook.runner)"
    )
    assert "Runner" in fresh(code)


def test_the_bare_package_loads_nothing_heavy() -> None:
    names = ("grpc", "wasmtime", "nats", "pydantic", "cryptography")
    code = f"import sys, agentweave_bus\nprint([name for name in {names} if name in sys.modules])"
    assert fresh(code) == "[]"
