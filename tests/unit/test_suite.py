"""What fails twice has failed; what failed once is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.suite import MOST_TRIED_AGAIN

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def suite(body, *arguments):
        (tmp_path / "test_it.py").write_text(body)
        command = [sys.executable, "-m", "tests.suite", "-q", "-c", "pytest.ini", "test_it.py", *arguments]
        environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    return suite


def failing(number: int) -> str:
    return "".join(f"def test_{n}(): assert not {n + 1}\n" for n in range(number)) + "def test_good(): pass\n"


ONCE = """
from pathlib import Path
def test_first_time():
    seen = Path("seen").exists()
    Path("seen").touch()
    assert seen
"""


@pytest.mark.parametrize("arguments", [(), ("-n", "2")])
def test_what_fails_once_passes_and_is_named(run, arguments):
    done = run(ONCE, *arguments)
    assert done.returncode == 0, done.stdout
    assert "FAILED ONCE, then passed alone: test_it.py::test_first_time" in done.stdout


def test_what_fails_twice_has_failed(run):
    done = run(failing(1))
    assert done.returncode == 1
    assert "Tried once more" in done.stdout
    assert "FAILED ONCE" not in done.stdout


def test_many_failures_are_no_accident(run):
    done = run(failing(MOST_TRIED_AGAIN + 1))
    assert done.returncode == 1
    assert "Tried once more" not in done.stdout


def test_what_can_not_be_collected_has_failed(run):
    assert run("import nothing_of_this_name\n").returncode == 2


def test_what_passes_passes(run):
    done = run("def test_good(): pass\n")
    assert done.returncode == 0
    assert "once" not in done.stdout.lower()
