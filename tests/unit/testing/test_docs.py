"""docs/testing.md says what is: its tests pass, and they are all run."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from agentweave_bus.testing import Bus
from agentweave_bus.testing import bus as bus_module
from tests.unit.testing.testing_page import TEXT, files

NAMES = re.findall(r"^(?:async )?def (test_\w+)\(([^)]*)\)", files()["test_shop.py"], re.MULTILINE)
ON_A_BUS = [name for name, takes in NAMES if takes == "bus: Bus"]
ALONE = [name for name, takes in NAMES if not takes]
ON_A_SERVER = [name for name, takes in NAMES if "durable_bus" in takes]


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """The page's files as modules. That they also run by themselves is a slow test of test_testing_tools."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("shop", "test_shop"):
            module = ModuleType(name)
            patch.setitem(sys.modules, name, module)
            exec(compile(files()[f"{name}.py"], f"{name}.py", "exec", dont_inherit=True), vars(module))
        yield vars(module)


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
