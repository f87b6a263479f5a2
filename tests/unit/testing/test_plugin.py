"""The plugin as people have it: installed, found by pytest, and out of the way of everybody else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import asyncio
import pytest
from agentweave_bus import SecureAgent, capability
from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.testing import MemoryBus

class HelloAgent(SecureAgent):
    @capability("greet", safe=True)
    async def greet(self) -> dict:
        return {"hello": True}

async def greeted(bus):
    await bus.grant("client/cli", HelloAgent, "greet")
    hello = await bus.start(HelloAgent)
    client = await bus.client()
    assert (await client.call(hello.spiffe_id, "greet")).data == {"hello": True}
    assert hello.spiffe_id == "spiffe://shop.test/agent/hello"

@pytest.fixture(scope="session")
def bus_trust_domain():
    return "shop.test"

@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.fixture
async def hello(bus):
    await bus.grant("client/cli", HelloAgent, "greet")
    return await bus.start(HelloAgent)

FOLDERS = []

@pytest.mark.anyio
async def test_with_anyio(bus):
    FOLDERS.append(bus.folder)
    await greeted(bus)

@pytest.mark.anyio
async def test_with_a_fixture_of_ones_own(hello, bus):
    client = await bus.client()
    assert (await client.call(hello.spiffe_id, "greet")).data == {"hello": True}

def test_nothing_is_left_of_the_one_before():
    assert not FOLDERS[0].exists()

def test_with_no_plugin(bus):
    async def main():
        async with bus:
            await greeted(bus)
    asyncio.run(main())

def test_unused(bus):
    pass

@pytest.mark.anyio
@pytest.mark.xfail(strict=True, raises=RuntimeError)
async def test_what_fails_still_closes_its_bus(bus):
    FOLDERS[0] = bus.folder
    await greeted(bus)
    raise RuntimeError

def test_it_was_closed():
    assert not FOLDERS[0].exists()

def test_left_open(bus):
    asyncio.run(greeted(bus))
"""


@pytest.mark.slow  # it starts processes of its own
def test_as_installed(tmp_path: Path) -> None:
    (tmp_path / "test_hello.py").write_text(TESTS)
    command = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert "7 passed, 1 xfailed, 1 error" in done.stdout, done.stdout
    assert "ERROR test_hello.py::test_left_open" in done.stdout
    assert "this bus was opened and not closed" in done.stdout


def test_it_costs_nobody_anything() -> None:
    """It is imported in every run of pytest, so it must bring nothing along."""
    code = (
        "import sys, pytest; before = set(sys.modules)\n"
        "import agentweave_bus.testing.plugin, agentweave_bus.embedded.durable_plugin\n"
        "print(*sorted(name for name in set(sys.modules) - before if not name.startswith('agentweave_bus')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    assert set(done.stdout.split()) <= {"__future__", "typing", "importlib", "functools", "inspect"}
