"""A child started with a lifeline dies with its parent, even when that is killed outright."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agentweave_bus.supervisor.lifeline import dies_with_this_process

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")

PARENT = """
import subprocess, sys
from agentweave_bus.supervisor.lifeline import dies_with_this_process
command = [sys.executable, "-c", "print('up', flush=True); import time; time.sleep(60)"]
if sys.argv[1] == "with":
    command = dies_with_this_process(command)
subprocess.Popen(command, start_new_session=True)
import time; time.sleep(60)
"""


def start_and_kill_parent(kind: str) -> bool:
    """Say whether the grandchild ended with its parent, long before its own time: its pipe is closed then."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, kind], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"up\n"
    parent.kill()
    parent.wait()
    readable, _, _ = select.select([parent.stdout], [], [], 30.0)
    ended = bool(readable) and parent.stdout.read(1) == b""
    parent.stdout.close()
    return ended


def test_it_dies_with_its_parent() -> None:
    assert start_and_kill_parent("with")


def test_the_process_is_the_command_itself(tmp_path: Path) -> None:
    out = tmp_path / "pid"
    code = f"import os; open({str(out)!r}, 'w').write(f'{{os.getpid()}} {{os.environ[\"MARK\"]}}')"
    child = subprocess.Popen(
        dies_with_this_process([sys.executable, "-c", code]), env={**os.environ, "MARK": "kept"}
    )
    assert child.wait(20) == 0
    assert out.read_text() == f"{child.pid} kept"


def test_it_does_not_begin_when_the_parent_is_gone_already() -> None:
    command = list(dies_with_this_process([sys.executable, "-c", "print('ran')"], by=signal.SIGTERM))
    position = command.index(str(os.getpid()))
    command[position] = "1" if os.getpid() != 1 else "2"  # as if the real parent had died in between
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (1, "")
