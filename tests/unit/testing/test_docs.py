"""docs/testing.md says what is: its tests pass, and they are all run."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus.testing import Bus
from agentweave_bus.testing import bus as bus_module

TEXT = (Path(__file__).parents[3] / "docs" / "testing.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
NAMES = re.findall(r"^(?:async )?def (test_\w+)\(([^)]*)\)", "".join(BLOCKS), re.MULTILINE)
ON_A_BUS = [name for name, takes in NAMES if takes == "bus: Bus"]
ALONE = [name for name, takes in NAMES if not takes]
ON_A_SERVER = [name for name, takes in NAMES if "durable_bus" in takes]


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Every python block of the page, run in order in one namespace as a reader would paste them."""
    namespace: dict[str, Any] = {"__name__": "testing_page"}
    for block in BLOCKS:
        exec(compile(block, "testing.md", "exec", dont_inherit=True), namespace)
    return namespace


@pytest.mark.anyio
@pytest.mark.parametrize("name", ALONE)
async def test_examples_without_a_bus(page: dict[str, Any], name: str) -> None:
    outcome = page[name]()
    if inspect.iscoroutine(outcome):
        await outcome


@pytest.mark.anyio
@pytest.mark.parametrize("name", ON_A_BUS)
async def test_examples_on_a_bus(page: dict[str, Any], name: str, bus: Bus) -> None:
    await page[name](bus)


def test_every_example_is_run() -> None:
    assert len(NAMES) == len(ALONE) + len(ON_A_BUS) + len(ON_A_SERVER)
    assert (len(ALONE), len(ON_A_BUS), len(ON_A_SERVER)) == (4, 5, 1)


def test_every_method_that_the_page_names_exists() -> None:
    named = set(re.findall(r"\bbus\.(\w+)", TEXT))
    assert len(named) >= 10
    missing = {name for name in named if not hasattr(bus_module.Bus, name)}
    assert missing <= {"trust_domain", "start_worker", "clock"}
