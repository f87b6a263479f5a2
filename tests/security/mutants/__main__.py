# ruff: noqa: T201 - a command prints
"""``python -m tests.security.mutants [--only TEXT] [--write]``: take out each check in turn; see who notices.

Ends with 1 when a mutant survives that should not, no longer applies, or breaks honest calls, too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.security.mutants import ALL
from tests.security.mutants.mutant import DoesNotApplyError, Mutant, mutated
from tests.security.mutants.page import NOTICED, PAGE, SURVIVES, Row, document_with
from tests.security.mutants.workshop import ROOT, Outcome, Workshop

LANES = 2
# Proof that what is taken out is out: with these no call is admitted, and no worker process lives.
CONTROLS = (
    Mutant(
        part="control",
        what="nothing is admitted",
        file="agentweave_bus/bus/admission.py",
        function="Admission.admit",
        put="raise RuntimeError('control')",
        tests=("test_headers.py",),
    ),
    Mutant(
        part="control",
        what="worker processes end",
        file="agentweave_bus/worker.py",
        function="main",
        put="raise SystemExit(71)",
        tests=("test_replay_restart.py::test_a_restarted_worker_process",),
    ),
)


class Lanes:
    """As many workshops as run at once."""

    def __init__(self, folder: Path) -> None:
        self._free: SimpleQueue[Workshop] = SimpleQueue()
        for number in range(LANES):
            self._free.put(Workshop(folder / str(number)))

    def check_imports(self) -> None:
        """See that each imports its own copy."""
        for _ in range(LANES):
            workshop = self._free.get()
            workshop.check_imports()
            self._free.put(workshop)

    def baseline(self, tests: Sequence[str]) -> Outcome:
        """Run tests with nothing taken out."""
        workshop = self._free.get()
        try:
            return workshop.run(tests, first_failure=False)
        finally:
            self._free.put(workshop)

    def judge(self, mutant: Mutant) -> Row:
        """Take one check out, run its attacks, and say what came of it."""
        workshop, began = self._free.get(), time.monotonic()
        try:
            with workshop.without(mutant):
                outcome = workshop.run(mutant.tests)
        except DoesNotApplyError as problem:
            outcome = Outcome(passed=False, by="", output=str(problem))
        finally:
            self._free.put(workshop)
        return _row(mutant, outcome, time.monotonic() - began)


def _row(mutant: Mutant, outcome: Outcome, seconds: float) -> Row:
    if outcome.passed and mutant.survives:
        return Row(mutant, SURVIVES, mutant.survives, seconds)
    if outcome.passed:
        return Row(mutant, "SURVIVED", "no attack noticed", seconds)
    if not outcome.by:
        return Row(mutant, "NO VERDICT", outcome.output[-1500:], seconds)
    if mutant.survives:
        return Row(mutant, "NOTICED AFTER ALL", outcome.by, seconds)
    return Row(mutant, NOTICED, outcome.by, seconds)


def _sets(mutants: Sequence[Mutant]) -> list[list[str]]:
    """All tests that are named, in as many sets as there are lanes, whole files together."""
    files: dict[str, dict[str, None]] = {}
    for mutant in mutants:
        for test in mutant.tests:
            files.setdefault(test.partition("::")[0], {})[test] = None
    sets: list[list[str]] = [[] for _ in range(LANES)]
    for tests in files.values():
        whole = [test for test in tests if "::" not in test]
        min(sets, key=len).extend(whole or tests)
    return [one for one in sets if one]


def main(arguments: Sequence[str]) -> int:
    """Run it; return the code to end with."""
    parser = argparse.ArgumentParser(prog="python -m tests.security.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    parser.add_argument(
        "--write", action="store_true", help="write docs/mutants.md, when all are as expected"
    )
    options = parser.parse_args(arguments)
    chosen = [mutant for mutant in ALL if options.only in mutant.name]
    for mutant in (*chosen, *CONTROLS):
        mutated((ROOT / mutant.file).read_text(), mutant)  # all apply, or it ends before anything has run
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="awm-") as folder, ThreadPoolExecutor(LANES) as pool:
        lanes = Lanes(Path(folder))
        lanes.check_imports()
        for outcome in pool.map(lanes.baseline, _sets((*chosen, *CONTROLS))):
            if not outcome.passed:
                print(f"Attacks fail with nothing taken out:\n{outcome.output[-4000:]}")
                return 1
        print(
            f"With nothing taken out all attacks are refused ({time.monotonic() - began:.0f} s).", flush=True
        )
        for row in pool.map(lanes.judge, CONTROLS):
            if row.verdict == "SURVIVED":
                print(f"{row.mutant.name}: not seen, so nothing that follows would mean anything.")
                return 1
        rows = []
        for row in pool.map(lanes.judge, chosen):
            rows.append(row)
            print(row, flush=True)
    bad = [row for row in rows if row.verdict not in (NOTICED, SURVIVES)]
    expected = sum(row.verdict == SURVIVES for row in rows)
    print(
        f"{len(rows)} mutants in {time.monotonic() - began:.0f} s: {len(rows) - len(bad) - expected} noticed, "
        f"{expected} survive for a reason that is known, {len(bad)} otherwise."
    )
    if options.write and not bad and not options.only:
        PAGE.write_text(document_with(PAGE.read_text(), rows))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
