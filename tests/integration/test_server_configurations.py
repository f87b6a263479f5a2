"""What nats-server itself says of the configurations in ``nats/`` and of the users that are generated."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from agentweave_bus.cli import main
from agentweave_bus.control.broker import broker_id
from agentweave_bus.embedded.nats_server import find_nats_server
from agentweave_bus.identity import Authority

CONFIGURATIONS = sorted((Path(__file__).parents[2] / "nats").glob("*.conf"))
DOMAIN = "shop.example"
GRANTS = {
    "grants": [
        {
            "caller": f"spiffe://{DOMAIN}/client/cli",
            "callee": f"spiffe://{DOMAIN}/agent/a",
            "capabilities": ["*"],
        },
        {
            "caller": f"spiffe://{DOMAIN}/agent/a",
            "callee": [f"spiffe://{DOMAIN}/agent/b", f"spiffe://{DOMAIN}/agent/c"],
            "capabilities": ["order.*"],
            "kinds": ["event"],
        },
        {
            "caller": "spiffe://other.example/agent/x",
            "callee": f"spiffe://{DOMAIN}/agent/a",
            "capabilities": ["*"],
        },
        {
            "caller": f"spiffe://{DOMAIN}/desk/*",
            "callee": f"spiffe://{DOMAIN}/agent/a",
            "capabilities": ["buy"],
        },
    ],
    "operators": [{"who": f"spiffe://{DOMAIN}/client/op", "may": ["control:redrive"]}],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as docs/deployment.md has it: the SVID of a broker, and the users from a control role's file."""
    (tmp_path / "grants.yaml").write_text(yaml.safe_dump(GRANTS))
    control = {
        "trust_domain": DOMAIN,
        "grants": "grants.yaml",
        "identities": [f"spiffe://{DOMAIN}/desk/eve"],
    }
    (tmp_path / "control.yaml").write_text(yaml.safe_dump(control))
    authority = Authority(DOMAIN)
    svid = authority.issue(broker_id(DOMAIN))
    folder = tmp_path / "svid"
    folder.mkdir()
    (folder / "svid.pem").write_bytes(svid.chain_pem())
    (folder / "key.pem").write_bytes(svid.key_pem())
    (folder / "bundle.pem").write_bytes(authority.bundle.to_pem())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said_of(configuration: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [find_nats_server().path, "-t", "-c", configuration.name],
        cwd=configuration.parent,
        env={**os.environ, "NATS_NAME": "nats-1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def users_of(path: Path) -> dict[str, dict]:
    """The users as text: nats-server's format is JSON's superset, and YAML's flow style reads these lines."""
    lines = [line.strip().rstrip(",") for line in path.read_text().splitlines() if '"user"' in line]
    return {one["user"]: one["permissions"] for one in map(yaml.safe_load, lines)}


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda path: path.stem)
def test_a_configuration_to_start_from_is_taken(place: Path, configuration: Path) -> None:
    assert main(["authz", "broker", "control.yaml", "--write", "users.conf"]) == 0
    shutil.copy(configuration, place)
    said = said_of(place / configuration.name)
    assert said.returncode == 0, said.stderr
    settings = [line.split("#")[0] for line in configuration.read_text().splitlines()]
    assert not any("no_auth_user" in line or "allow_non_tls" in line for line in settings)
    assert settings.count("include users.conf") == 1


def test_there_is_a_configuration_for_each_size() -> None:
    assert [one.stem for one in CONFIGURATIONS] == ["cluster", "development", "single"]


def test_the_users_are_those_whom_the_grants_name_and_those_who_are_listed(place: Path) -> None:
    assert main(["authz", "broker", "control.yaml", "--write", "users.conf"]) == 0
    users = users_of(place / "users.conf")
    of_the_domain = (
        "agent/a",
        "agent/b",
        "agent/c",
        "client/cli",
        "client/op",
        "desk/eve",
        "agentweave/control",
    )
    assert list(users) == [f"spiffe://{DOMAIN}/{path}" for path in of_the_domain]
    assert all(set(one) == {"publish", "subscribe"} for one in users.values())
    assert "aw.call.shop=example.agent/a.buy" in users[f"spiffe://{DOMAIN}/desk/eve"]["publish"]["allow"]


def test_the_same_grants_give_the_same_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["authz", "broker", "control.yaml"]) == 0
    first = capsys.readouterr().out
    (place / "grants.yaml").write_text(yaml.safe_dump({**GRANTS, "grants": GRANTS["grants"][::-1]}))
    assert main(["authz", "broker", "control.yaml"]) == 0
    assert capsys.readouterr().out == first
    assert first.startswith("# Users and their permissions, by `agentweave authz broker control.yaml`.")


def test_who_is_revoked_has_no_user(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    revoked = f"spiffe://{DOMAIN}/agent/a"
    entry = {"spiffe_id": revoked, "reason": "lost", "time": "2026-01-01T00:00:00Z"}
    (place / "revocations.yaml").write_text(yaml.safe_dump({"revoked": [entry]}))
    control = yaml.safe_load((place / "control.yaml").read_text())
    (place / "control.yaml").write_text(
        yaml.safe_dump({**control, "identity": {"revocations": "revocations.yaml"}})
    )
    assert main(["authz", "broker", "control.yaml"]) == 0
    text = capsys.readouterr().out
    assert f'"user": "{revoked}"' not in text
    assert f'"user": "spiffe://{DOMAIN}/agent/b"' in text


def test_a_prefix_below_which_nobody_is_known_is_told(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["authz", "broker", "control.yaml"]) == 0
    assert "warning" not in capsys.readouterr().err
    control = yaml.safe_load((place / "control.yaml").read_text())
    (place / "control.yaml").write_text(yaml.safe_dump({**control, "identities": []}))
    assert main(["authz", "broker", "control.yaml"]) == 0
    assert f"nobody below spiffe://{DOMAIN}/desk/* has a user" in capsys.readouterr().err


def test_without_grants_nothing_is_written(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "users.conf").write_text("as it was")
    (place / "grants.yaml").unlink()
    assert main(["authz", "broker", "control.yaml", "--write", "users.conf"]) == 2
    assert "grants.yaml" in capsys.readouterr().err
    assert (place / "users.conf").read_text() == "as it was"
