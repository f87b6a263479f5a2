"""What `up` and `dev` say when a stack has come up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agentweave_bus.cli.stack_ready import how_to_look
from agentweave_bus.config import StackConfig
from agentweave_bus.spiffe_id import SpiffeID

OPERATOR = SpiffeID("spiffe://a.io/client/operator")
CLI = SpiffeID("spiffe://a.io/client/cli")
MAY_LOOK = "operators: [{who: spiffe://a.io/client/operator, may: [control:observe]}]\n"


def stack(folder: Path, grants: str, state_dir: Path) -> Any:
    file = folder / "grants.yaml"
    file.write_text(grants)
    clients = {one: state_dir / "clients" / f"{one.path.rpartition('/')[2]}.yaml" for one in (CLI, OPERATOR)}
    config = StackConfig.model_validate({"trust_domain": "a.io", "grants": str(file)})
    return cast("Any", SimpleNamespace(config=config, clients=clients))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_first_client_who_may_look_opens_the_console(here: Path) -> None:
    (said,) = how_to_look(stack(here, MAY_LOOK, here / ".agentweave"))
    assert said.endswith("\n  agentweave console --as operator")


def test_elsewhere_it_takes_the_whole_way(here: Path) -> None:
    (said,) = how_to_look(stack(here, MAY_LOOK, Path("/run/shop")))
    config = "--config /run/shop/clients/operator.yaml --state-dir /run/shop"
    assert said.endswith(f"\n  agentweave console {config}")


def test_nobody_may_look(here: Path) -> None:
    assert how_to_look(stack(here, "grants: []\n", here / ".agentweave")) == []
