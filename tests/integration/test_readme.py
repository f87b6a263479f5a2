"""The README is true: its commands exist, its agent runs as shown, and the demo prints what it quotes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
DEADLINE = 60


def block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    found = [one for one in blocks if containing in one]
    assert len(found) == 1, f"one {language} block about {containing!r}"
    return str(found[0])


def shape(line: str) -> str:
    """What a line says, apart from ids, numbers and the width of its columns."""
    line = re.sub(r"\b[0-9a-f]{6,8}…", "ID", line)
    return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?", "N", line)).strip()


def test_it_is_one_screen_and_its_links_lead_somewhere() -> None:
    assert len(README.split()) <= 450
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target


@pytest.mark.parametrize("target", ["demo", "test"])
def test_its_two_commands_are_targets(target: str) -> None:
    assert f"$ make {target}\n" in README
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, timeout=DEADLINE)


@pytest.mark.slow  # it is the whole demo
def test_the_demo_prints_what_is_quoted() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "workers.ecommerce.demo"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = {shape(line) for line in done.stdout.splitlines()}
    quoted = [shape(line) for line in block("text", "checks came out").splitlines()]
    assert [line for line in quoted if line not in printed] == []


def test_the_agent_runs_as_shown(tmp_path: Path) -> None:
    subprocess.run(
        ["agentweave", "new", "hello"], cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=DEADLINE
    )
    project = tmp_path / "hello"
    (project / "hello.py").write_text(block("python", "class HelloAgent"))
    (project / "grants.yaml").write_text(block("yaml", "grants:"))
    command = block("console", "agentweave call").removeprefix("$ ")
    up = subprocess.Popen(
        ["agentweave", "up"], cwd=project, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert up.stdout is not None
        assert up.stdout.readline(), "up ended before it was ready"
        done = subprocess.run(
            shlex.split(command),
            cwd=project,
            env=ENVIRONMENT,
            capture_output=True,
            check=False,
            timeout=DEADLINE,
        )
        assert done.returncode == 0, done.stderr.decode()
        answer = json.loads(done.stdout)["artifacts"][0]["data"]
        assert answer == {"greeting": "Hello, Ada! ", "for": "spiffe://agentweave.local/client/cli"}
    finally:
        up.terminate()
        try:
            up.communicate(timeout=DEADLINE)
        finally:
            up.kill()
    assert up.returncode == 0
