# ruff: noqa: T201 - a command prints
"""Take out each check in turn and see which attack notices.

Mutants run in private copies of the repository, several at a time; nothing of the repository is changed, but
for docs/mutants.md with --write.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import NoReturn

from tests.security.mutants import ALL, which_do_not_apply
from tests.security.mutants.mutant import Mutant
from tests.security.mutants.page import NOTICED, PAGE, SURVIVES, Row, document_with
from tests.security.mutants.workshop import ROOT, SUITE, Outcome, Workshop

EXIT_CODES = """\
ends with
  0  every mutant is noticed, or survives for a reason that is known
  1  a mutant survives that should not, is noticed although it should survive, or breaks honest calls, too
  2  the options are wrong
  3  nothing can be concluded: attacks fail with nothing taken out, or a check is not there to be taken out
  130, 143  it was stopped by Ctrl-C or SIGTERM; nothing is left behind
"""
LANES = 3  # much of a run is waiting: for brokers to start, and for what does not come
WIDTH_OF_A_FILE = 250
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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


class _StoppedError(BaseException):
    """A signal asked for the end."""


class _InconclusiveError(Exception):
    """Why nothing follows from what was seen."""


class Lanes:
    """As many workshops as run at once."""

    def __init__(self, folder: Path) -> None:
        self._all = [Workshop(folder / str(number)) for number in range(LANES)]
        self._free: SimpleQueue[Workshop] = SimpleQueue()
        for workshop in self._all:
            workshop.check_imports()
            self._free.put(workshop)

    def stop(self) -> None:
        """End what runs; nothing runs after that."""
        for workshop in self._all:
            workshop.stop()

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
    """All tests that are named, in as many sets as there are lanes; whole files together, in their order."""
    files: dict[str, set[str]] = {}
    for mutant in mutants:
        for test in mutant.tests:
            files.setdefault(test.partition("::")[0], set()).add(test)
    sets: list[list[str]] = [[] for _ in range(LANES)]
    for file, tests in files.items():
        whole = [file] if file in tests else sorted(tests, key=_order_in(file))
        min(sets, key=len).extend(whole)
    return [one for one in sets if one]


def _order_in(file: str):
    names = re.findall(r"^async def (\w+)|^def (\w+)", (ROOT / SUITE / file).read_text(), re.MULTILINE)
    order = {async_name or name: place for place, (async_name, name) in enumerate(names)}
    return lambda test: (order[test.partition("::")[2].partition("[")[0]], test)


@contextmanager
def _pool_of_lanes() -> Iterator[tuple[ThreadPoolExecutor, Lanes]]:
    """Threads and workshops; whatever ends the block ends what runs in them, and removes their folder."""
    folder = Path(tempfile.mkdtemp(prefix="awm-"))
    try:
        lanes = Lanes(folder)
        with ThreadPoolExecutor(LANES) as pool:
            try:
                yield pool, lanes
            except BaseException:
                _stop_listening()
                pool.shutdown(wait=False, cancel_futures=True)
                lanes.stop()
                raise
    finally:
        _stop_listening()
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove it, also while a broker whose test was cut off writes its last into it."""
    give_up = time.monotonic() + 10
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=time.monotonic() < give_up)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    raise _StoppedError(number)


def _stop_listening() -> None:
    for one in STOPPING:
        signal.signal(one, signal.SIG_IGN)


def _judged(chosen: Sequence[Mutant], width: int) -> list[Row]:
    """See that the attacks pass and that mutants are what runs; then judge the mutants and print the table.

    Raises:
        _InconclusiveError: one or the other is not so.

    """
    began = time.monotonic()
    with _pool_of_lanes() as (pool, lanes):
        for outcome in pool.map(lanes.baseline, _sets((*chosen, *CONTROLS))):
            if not outcome.passed:
                raise _InconclusiveError(f"Attacks fail with nothing taken out:\n{outcome.output[-4000:]}")
        print(f"With nothing taken out all attacks are refused ({time.monotonic() - began:.0f} s).")
        rows: list[Row] = []
        for row in pool.map(lanes.judge, (*CONTROLS, *chosen)):
            if row.mutant not in CONTROLS:
                if not rows or rows[-1].mutant.part != row.mutant.part:
                    print(f"\n{row.mutant.where}")
                rows.append(row)
                print(row.line(width), flush=True)
            elif row.verdict == "SURVIVED":
                raise _InconclusiveError(
                    f"{row.mutant.name}: not seen, so nothing that follows would mean anything."
                )
    return rows


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.security.mutants",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help='mutants whose name contains this, such as "step 7:" or "rule 5"; may stand several times',
    )
    chosen.add_argument("--list", action="store_true", help="print their names, and run none")
    chosen.add_argument(
        "--write", action="store_true", help="write docs/mutants.md, when all are as expected"
    )
    options = parser.parse_args(arguments)
    options.mutants = [one for one in ALL if any(text in one.name for text in options.only or [""])]
    if not options.mutants:
        parser.error(f"no mutant's name contains {options.only}; --list prints them")
    return options


def main(arguments: Sequence[str]) -> int:
    """Run it; return the code to end with."""
    options = _options(arguments)
    if options.list:
        print("\n".join(one.name for one in options.mutants))
        return 0
    for one in STOPPING:
        signal.signal(one, _stop)
    began = time.monotonic()
    try:
        if gone := which_do_not_apply(ROOT, (*options.mutants, *CONTROLS)):
            raise _InconclusiveError("Not there to be taken out:\n  " + "\n  ".join(gone))
        rows = _judged(options.mutants, shutil.get_terminal_size((WIDTH_OF_A_FILE, 24)).columns)
    except _InconclusiveError as problem:
        print(problem)
        return 3
    except _StoppedError as stopped:
        print("\nStopped.")
        return 128 + int(stopped.args[0])
    bad = [row for row in rows if row.verdict not in (NOTICED, SURVIVES)]
    expected = sum(row.verdict == SURVIVES for row in rows)
    print(
        f"\n{len(rows)} mutants in {time.monotonic() - began:.0f} s: {len(rows) - len(bad) - expected} noticed, "
        f"{expected} survive for a reason that is known, {len(bad)} otherwise."
    )
    for row in bad:
        print(f"  {row.verdict}: {row.mutant.name}")
    if options.write and not bad:
        PAGE.write_text(document_with(PAGE.read_text(), rows))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
