"""A private copy of the repository in which a check is taken out, the attacks are run, and the check put back.

Tests of the copy import the copy's product, in child processes, too: ``PYTHONPATH`` says so, and
:meth:`Workshop.check_imports` looks. Nothing of the original is touched, and what tests leave in the folder
for temporary files is in the copy's folder and goes with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agentweave_bus.supervisor.lifeline import dies_with_this_process
from tests.security.mutants.mutant import Mutant, mutated

__all__ = ["Outcome", "Workshop"]

ROOT = Path(__file__).resolve().parents[3]
SUITE = "tests/security/"
RUN_SECONDS = 100
BASELINE_SECONDS = 300
ENDING_SECONDS = 10
# What does not come should be missed soon. Only waiting is cut: the deadline of a call is signed, and with
# a shorter one a call would be refused for its time where its attack is about something else.
PATIENCE = (
    "tests/integration/connections.py",
    "from tests.integration.probes import PATIENCE\n",
    "PATIENCE = 4.0\n",
)
_FAILED = re.compile(r"^FAILED (\S+::\w+(?:\[.*?\])?)(?: - |$)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the attacks said. ``passed`` when all did; ``by`` names the first that failed, if one did."""

    passed: bool
    by: str
    output: str


class Workshop:
    """One copy. Use it for one mutant at a time; :meth:`stop` may come from another thread."""

    def __init__(self, folder: Path) -> None:
        self._copy = folder / "copy"
        self._base = folder / "b"  # short, because names of sockets have to be
        self._temporary = folder / "t"
        self._temporary.mkdir(parents=True)
        self._written = 0
        self._lock = threading.Lock()
        self._stopped = False
        self._process: subprocess.Popen[str] | None = None
        _copy_repository(self._copy)
        path, patient, impatient = PATIENCE
        text = (self._copy / path).read_text()
        if text.count(patient) != 1:
            raise RuntimeError(f"{path} has no line {patient.strip()!r}, once")
        self._write(path, text.replace(patient, impatient))

    def check_imports(self) -> None:
        """See that processes started anywhere import the copy.

        Raises:
            RuntimeError: they do not.

        """
        code = (
            "import agentweave_bus, tests.security.catalogue as t; print(agentweave_bus.__file__, t.__file__)"
        )
        said = subprocess.run(
            [sys.executable, "-c", code],
            cwd="/",
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.split()
        if not all(Path(one).is_relative_to(self._copy) for one in said):
            raise RuntimeError(f"the copy in {self._copy} is not what is imported, but {said}")

    @contextmanager
    def without(self, mutant: Mutant) -> Iterator[None]:
        """Take the check out for a while."""
        original = (self._copy / mutant.file).read_text()
        self._write(mutant.file, mutated(original, mutant))
        try:
            yield
        finally:
            self._write(mutant.file, original)

    def run(self, tests: Sequence[str], *, first_failure: bool = True) -> Outcome:
        """Run attacks by their arguments for pytest, relative to the suite."""
        process = self._start(tests, first_failure=first_failure)
        if process is None:
            return Outcome(passed=False, by="", output="stopped before it began")
        try:
            output, _ = process.communicate(timeout=RUN_SECONDS if first_failure else BASELINE_SECONDS)
        except subprocess.TimeoutExpired:
            _end(process)
            output, _ = process.communicate()
            return Outcome(passed=False, by="", output=f"{output}\nnot done in time")
        found = _FAILED.search(output) if process.returncode == 1 else None
        by = found[1].removeprefix(SUITE).removeprefix("tests/") if found else ""
        return Outcome(passed=process.returncode == 0, by=by, output=output)

    def stop(self) -> None:
        """End what runs, and let nothing begin again."""
        with self._lock:
            self._stopped = True
            process = self._process
        if process is not None:
            _end(process)

    def _start(self, tests: Sequence[str], *, first_failure: bool) -> subprocess.Popen[str] | None:
        command = (
            *(sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-rfE", "-m", "not slow"),
            *("-p", "no:cacheprovider", f"--basetemp={self._base}"),
            *(("-x",) if first_failure else ()),
            *(os.path.normpath(SUITE + test) for test in tests),
        )
        with self._lock:
            if self._stopped:
                return None
            self._process = subprocess.Popen(
                dies_with_this_process(command),
                cwd=self._copy,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # Ctrl-C is for who started it: a test must not end on it half done
            )
            return self._process

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(self._copy),
            "PYTHONPYCACHEPREFIX": str(self._copy / ".pycache"),
            "TMPDIR": str(self._temporary),
            "COLUMNS": "300",
        }

    def _write(self, file: str, text: str) -> None:
        path = self._copy / file
        path.write_text(text)
        # Compiled files are known by size and whole seconds: two texts of one second must not look alike.
        self._written += 1
        os.utime(path, (1_000_000_000 + self._written, 1_000_000_000 + self._written))


def _end(process: subprocess.Popen[str]) -> None:
    """End a run of pytest in good order, so that it ends brokers and workers; or else at once."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _copy_repository(target: Path) -> None:
    """Copy what git knows or would take, as it stands in the working tree, and what is built for the product."""
    product = "agentweave_bus"
    shutil.copytree(ROOT / product, target / product, ignore=shutil.ignore_patterns("__pycache__"))
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
