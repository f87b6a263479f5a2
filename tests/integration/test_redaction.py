"""Values that must not be written down: a payload's secrets, through an agent that runs, and all that tells of it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from prometheus_client import generate_latest

from agentweave_bus import capability
from agentweave_bus.authz.redaction import REDACTED
from agentweave_bus.cli import main
from agentweave_bus.exceptions import AuthorizationError, CallRefusedError
from tests.integration.probes import CLI, ECHO, OTHER, PATIENCE, Probe

pytestmark = pytest.mark.anyio

SECRET = "Xk7-do-not-write-this"
SETTINGS = {"redact": ["password", "token", "profile.card"], "keep_frames": False}


class Enrolling(Probe):
    @capability("enrol")
    async def enrol(self, name: str, password: str, profile: dict[str, Any]) -> dict[str, Any]:
        """Take secrets."""
        assert SECRET in password + str(profile)
        self.ran.append("enrol")
        return {"enrolled": name}


def audit(world, name):
    return {"authorization__audit": {"destination": str(world.folder / "audit" / f"{name}.jsonl")} | SETTINGS}


@pytest.fixture
async def enrolling(world):
    return await world.agent(ECHO, Enrolling, **audit(world, "echo"))


@pytest.fixture
async def caller(world):
    return await world.client(CLI, **audit(world, "cli"))


def application(**changes):
    profile = {"card": SECRET, "seen": "a visible note", "accounts": [{"token": SECRET, "bank": "b"}]}
    return {"name": "ann", "password": SECRET, "profile": profile} | changes


async def test_a_secret_is_in_no_log_and_no_command_shows_it(world, enrolling, caller, capsys, caplog):
    caplog.set_level(logging.DEBUG, logger="agentweave_bus")
    assert await caller.ask(ECHO, "enrol", application()) == {"enrolled": "ann"}
    for wrong in (
        application(password=[SECRET]),
        application(password={"password": SECRET}),
        application(token=SECRET),
        application(profile=[{"card": SECRET}]),
        {"password": SECRET},
    ):
        with pytest.raises(CallRefusedError) as refusal:
            await caller.call(str(ECHO), "enrol", wrong, timeout=PATIENCE)
        assert refusal.value.step == "payload"
        assert SECRET not in str(refusal.value)
    stranger = await world.client(OTHER, **audit(world, "other"))
    with pytest.raises(AuthorizationError) as denial:
        await stranger.call(str(ECHO), "enrol", application(), timeout=PATIENCE)
    assert enrolling.ran == ["enrol"]

    # It was there to be seen, and all around it was written down.
    admitted = world.audit("echo", event="admission")[-1]
    assert admitted["input"]["context"]["payload"] == {
        "name": "ann",
        "password": REDACTED,
        "profile": {
            "card": REDACTED,
            "seen": "a visible note",
            "accounts": [{"token": REDACTED, "bank": "b"}],
        },
    }
    assert len(world.refusals("echo", step_name="payload")) == 5
    folder = world.folder / "audit"
    assert {path.name.split(".")[0] for path in folder.iterdir()} == {"echo", "cli", "other"}
    for path in folder.iterdir():
        assert SECRET not in path.read_text()
    for command in (
        ["audit", "tail", "--audit", str(folder), "-n", "100"],
        ["audit", "tail", "--audit", str(folder), "-n", "100", "--json"],
        ["why", admitted["audit_id"], "--audit", str(folder)],
        ["why", denial.value.audit_id, "--audit", str(folder), "--json"],
        ["audit", "verify", str(folder)],
    ):
        assert main(command) == 0
    shown = capsys.readouterr()
    assert "enrol" in shown.out
    assert "a visible note" in shown.out
    assert SECRET not in shown.out + shown.err
    assert SECRET not in caplog.text
    assert SECRET not in generate_latest(enrolling.parts.metrics.registry).decode()
