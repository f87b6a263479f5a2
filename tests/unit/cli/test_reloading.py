"""Where files may not be changed under what runs, nothing starts that would take them up."""

from __future__ import annotations

import sys
from pathlib import Path

import anyio
import pytest

from agentweave_bus.cli import main
from agentweave_bus.cli.reloading import replace_on_change
from agentweave_bus.config import StackConfig
from agentweave_bus.dev.concerned import WatchedStack
from agentweave_bus.embedded.assembly import plan_agents
from agentweave_bus.exceptions import AgentWeaveError

FOR_DEVELOPMENT = "is for development, and this environment is production"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENTWEAVE_ENV", raising=False)
    (tmp_path / "agentweave.yaml").write_text("agents: []\n")


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        (["up", "--reload"], None),
        (["up", "--reload", "--env", "production"], "development"),
        (["supervise", "agentweave.yaml", "--reload"], "production"),
        (["dev"], "production"),
    ],
)
def test_production_is_refused(
    command: list[str],
    environment: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if environment is not None:
        monkeypatch.setenv("AGENTWEAVE_ENV", environment)
    assert main(command) == 2
    told = capsys.readouterr().err
    assert FOR_DEVELOPMENT in told
    assert ("--env development" in told) == (command != ["dev"])  # which has no such option


@pytest.mark.parametrize("hold", ["0", "-1", "nan", "61"])
def test_a_hold_is_a_number_of_seconds_that_means_something(
    hold: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dev", "--hold", hold]) == 2
    assert "--hold" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["dev"], ["up", "--reload", "--env", "development"]])
def test_without_watchfiles_it_says_how_to_get_it(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    assert main(command) == 2
    assert "pip install 'agentweave-bus[embedded]'" in capsys.readouterr().err


@pytest.mark.anyio
async def test_an_agent_that_is_there_no_more_ends_nothing(tmp_path: Path) -> None:
    """Its file gave it another name, and was read again: what changes then is still heard."""
    (tmp_path / "order.py").write_text("one")
    (tmp_path / "order.yaml").write_text(
        "agent: {name: order, trust_domain: shop.test, class: 'order:Order'}\n"
    )
    config = StackConfig(trust_domain="shop.test", agents=[{"config": str(tmp_path / "order.yaml")}])
    said: list[str] = []

    async def restart(name: str) -> None:
        raise AgentWeaveError(f"there is no agent {name!r} here, but: order2")

    async with anyio.create_task_group() as group:
        group.start_soon(replace_on_change, WatchedStack(config, plan_agents(config)), restart, said.append)
        with anyio.fail_after(30):
            for count in (2, 4):
                while len(said) < count:
                    (tmp_path / "order.py").write_text((tmp_path / "order.py").read_text() + "one")
                    await anyio.sleep(0.5)
        group.cancel_scope.cancel()
    assert said[:2] == [
        "order.py changed, which order is made of",
        "nothing is replaced: there is no agent 'order' here, but: order2",
    ]
