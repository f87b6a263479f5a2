"""What the command line's tests share: running it in this process, in a directory of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus.cli import main

GRANTS = """
grants:
  - caller: spiffe://shop.test/client/cli
    callee: spiffe://shop.test/agent/payment
    capabilities: [pay]
    limits: {max_amount: 100}
  - caller: spiffe://shop.test/client/cli
    callee: spiffe://shop.test/agent/payment
    capabilities: [health]
"""


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a stack's file and grants."""
    monkeypatch.chdir(tmp_path)
    for name in ("AGENTWEAVE_CONFIG", "AGENTWEAVE_ENV"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "grants.yaml").write_text(GRANTS)
    (tmp_path / "agentweave.yaml").write_text("trust_domain: shop.test\ngrants: grants.yaml\n")
    return tmp_path


@pytest.fixture
def run(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Callable[..., Ran]:
    """Run the command line in this process; output seems to go to a terminal with the fixture ``terminal``."""

    def call(*arguments: str) -> Ran:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: "terminal" in request.fixturenames)
            code = main(arguments)
        out, err = capsys.readouterr()
        return Ran(code, out, err)

    return call


@pytest.fixture
def terminal() -> None:
    """Make standard output seem to be a terminal, for ``run``."""
