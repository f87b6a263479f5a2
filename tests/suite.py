"""Run a part of the suite, as ``make test`` does: ``python -m tests.suite ARGUMENTS-OF-PYTEST``.

The tests use real processes, sockets and clocks. On a machine that stands still for seconds (a busy virtual one
does) one of thousands may fail for that alone. So up to three that failed are tried once more, alone, in a new
process. What fails twice has failed; what passes then is named, for it deserves a look. More than three, or an
error that is no test's, is no accident.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

__all__ = ["MOST_TRIED_AGAIN", "main"]

MOST_TRIED_AGAIN = 3


class _Failed:
    """Notes which tests failed, or could not be set up or taken down."""

    def __init__(self) -> None:
        self.tests: dict[str, None] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.tests[report.nodeid] = None


def main(arguments: list[str]) -> int:
    failed = _Failed()
    code = int(pytest.main(arguments, plugins=[failed]))
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        return 0
    tests = list(failed.tests)
    if code != pytest.ExitCode.TESTS_FAILED or not 0 < len(tests) <= MOST_TRIED_AGAIN:
        return code
    _say(f"\nTried once more, alone: {', '.join(tests)}")
    code = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], check=False).returncode
    if code == 0:
        _say(f"FAILED ONCE, then passed alone: {', '.join(tests)}")
    return code


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()  # before what pytest writes in its own process


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
