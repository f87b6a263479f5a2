"""What a worker does with its memory once it has started; in a process of its own."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc
from agentweave_bus.runtime.process import settle
before = gc.get_threshold()
settle()
assert gc.get_freeze_count() > 10_000, gc.get_freeze_count()
assert gc.get_threshold()[0] > before[0]
assert gc.get_threshold()[1:] == before[1:]
"""


def test_what_starting_left_is_out_of_the_collectors_sight():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
