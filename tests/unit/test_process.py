"""What a worker does with its memory once it has started; in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FROZEN = """
import gc
from agentweave_bus.runtime.process import settle
before = gc.get_threshold()
settle()
assert gc.get_freeze_count() > 10_000, gc.get_freeze_count()
assert gc.get_threshold()[0] > before[0]
assert gc.get_threshold()[1:] == before[1:]
"""

UNMAPPED = """
import re
from pathlib import Path
import wasmtime
from agentweave_bus.runtime.process import settle

def of_files():
    told = Path("/proc/self/smaps_rollup").read_text()
    kb = {name: int(re.search(rf"^{name}: +([0-9]+) kB", told, re.MULTILINE)[1]) for name in ("Rss", "Anonymous")}
    return kb["Rss"] - kb["Anonymous"]

def compiled():
    engine = wasmtime.Engine()
    return wasmtime.Module(engine, "(module (func (export \\"f\\") (result i32) i32.const 7))")

compiled()
before = of_files()
settle()
assert of_files() < before - 8_000, (before, of_files())
compiled()  # what is let go of is there again when it is run
"""

WRITTEN = """
import ctypes, mmap, sys
from agentweave_bus.runtime.process import settle

with open(sys.argv[1], "rb") as file:
    pages = mmap.mmap(file.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
place = ctypes.addressof(ctypes.c_char.from_buffer(pages))
pages[0] = 0xCC
protect = ctypes.CDLL(None).mprotect
protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
assert protect(place, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC) == 0
settle()
assert ctypes.c_ubyte.from_address(place).value == 0xCC
"""


def ran(script: str, *arguments: str) -> None:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_what_starting_left_is_out_of_the_collectors_sight() -> None:
    ran(FROZEN)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what code is mapped")
def test_code_that_only_starting_ran_is_resident_no_more() -> None:
    ran(UNMAPPED)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what code is mapped")
def test_a_breakpoint_in_code_stays(tmp_path: Path) -> None:
    """A page of code that was written to is not taken from its file again."""
    (tmp_path / "code").write_bytes(bytes(4096))
    ran(WRITTEN, str(tmp_path / "code"))
