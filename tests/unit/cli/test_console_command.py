"""`agentweave console`: what it says when it can't begin."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from agentweave_bus.cli import main

CONFIG = """
agent: {name: operator, trust_domain: shop.test, path: client/operator}
identity: {spiffe_endpoint: "unix:///nowhere.sock"}
bus: {servers: ["tls://127.0.0.1:1"]}
authorization: {bundle: grants.yaml}
"""


def test_without_its_packages_it_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "operator.yaml").write_text(CONFIG)
    for name in [one for one in sys.modules if one.startswith("agentweave_bus.console")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["console", "--config", str(tmp_path / "operator.yaml")]) == 2
    assert "pip install 'agentweave-bus[console]'" in capsys.readouterr().err


def test_without_a_stack_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENTWEAVE_CONFIG", raising=False)
    assert main(["console"]) == 2
    assert "agentweave up" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "shop.test"])
def test_others_are_not_let_in_by_accident(
    host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "operator.yaml").write_text(CONFIG)
    assert main(["console", "--config", str(tmp_path / "operator.yaml"), "--host", host]) == 2
    assert "--plain-http" in capsys.readouterr().err
