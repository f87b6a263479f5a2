"""A small run of the chaos, and runs of builds with parts taken out, which it must not let pass."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.chaos.site import ROOT

pytestmark = pytest.mark.slow

_TIMEOUT_S = 400


def chaos(*arguments: str) -> tuple[int, str]:
    """Run it as ``make chaos`` does; return its exit code and what it said."""
    command = [sys.executable, "-m", "tests.chaos", "--show", "1000", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    return done.returncode, f"{done.stdout}\n{done.stderr[-4000:]}"


def count(said: str, what: str) -> int:
    line = next((line for line in said.splitlines() if line.startswith(f"{what}  ")), f"{what} 0")
    return int(line.split()[-1].replace(",", ""))


def test_no_task_is_lost_and_no_outcome_recorded_twice():
    code, said = chaos("--tasks", "500", "--duration", "200", "--faults", "small", "--seed", "5")
    assert code == 0, said
    assert count(said, "findings") == 0, said
    assert count(said, "accepted") == 500, said
    assert count(said, "worker kills that hit running handlers") >= 6, said
    assert count(said, "tasks run more than once") > 0, said
    for fault in ("broker kills", "control kills", "submitter kills", "watcher kills"):
        assert count(said, fault) == 1, said


_LOST = "has no terminal record"
_TWICE = "was run 2 times"
_AFTER = "records after its terminal one"


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("cas", {"has more than one record in slot"}),
        # The late worker believes that its outcome stands, and who has the task then is killed; two begin the
        # same attempt; or what was cancelled meanwhile ends all the same.
        ("blind", {_LOST, _TWICE, _AFTER}),
    ],
)
def test_a_build_that_does_not_compare_and_set_is_caught(broken, told):
    code, said = chaos(
        *("--tasks", "100", "--duration", "18", "--ack-wait", "2", "--seed", "3"),
        *("--faults", "overlap", "--kinds", "slow", "--broken", broken),
    )
    assert code == 1, said
    assert any(words in said for words in told), said


def test_a_build_that_does_not_record_steps_is_caught():
    code, said = chaos(
        *("--tasks", "100", "--duration", "60", "--ack-wait", "2", "--seed", "3"),
        *("--faults", "crashes", "--kinds", "steps", "--broken", "steps"),
    )
    assert code == 1, said
    assert "returned and is not recorded" in said, said
    assert "and ran again in it" in said, said
