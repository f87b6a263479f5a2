"""A sampling profiler for child processes: where processor time goes, without slowing every call down.

The kernel counts the process's own time (``ITIMER_PROF``) and interrupts it at every tick in which it used
some (up to a thousand a second); what runs just then is noted. Sampling begins at SIGUSR2, so that starting
up is left out.
"""

from __future__ import annotations

import atexit
import signal
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Final

__all__ = ["install_sampler"]

_INTERVAL_S: Final = 0.001
_DEPTH: Final = 60


class _Samples:
    def __init__(self) -> None:
        self.own: Counter[tuple[CodeType, int]] = Counter()
        self.below: Counter[CodeType] = Counter()
        self.count = 0

    def note(self, _number: int, frame: FrameType | None) -> None:
        if frame is None:
            return
        self.count += 1
        self.own[frame.f_code, frame.f_lineno] += 1
        seen: set[CodeType] = set()
        depth = 0
        while frame is not None and depth < _DEPTH:
            seen.add(frame.f_code)
            frame, depth = frame.f_back, depth + 1
        self.below.update(seen)

    def report(self, top: int) -> str:
        functions: Counter[CodeType] = Counter()
        for (code, _line), number in self.own.items():
            functions[code] += number
        parts = [
            f"{self.count} samples of processor time",
            "\nown time, by package (what C functions take is their caller's)",
            *(self._line(number, name) for name, number in self._packages().most_common(16)),
            "\nown time, by function",
            *(self._line(number, _name(code)) for code, number in functions.most_common(top)),
            "\nown time, by line",
            *(self._line(n, f"{_name(code)} at {line}") for (code, line), n in self.own.most_common(top)),
            "\nwith what is called and awaited below",
            *(self._line(number, _name(code)) for code, number in self.below.most_common(2 * top)),
        ]
        return "\n".join(parts) + "\n"

    def _packages(self) -> Counter[str]:
        packages: Counter[str] = Counter()
        for (code, _line), number in self.own.items():
            packages[_package(code.co_filename)] += number
        return packages

    def _line(self, number: int, name: str) -> str:
        return f"{100 * number / max(1, self.count):6.1f} %  {name}"


def _name(code: CodeType) -> str:
    return f"{code.co_qualname}  ({'/'.join(Path(code.co_filename).parts[-2:])}:{code.co_firstlineno})"


def _package(file: str) -> str:
    """Return which package a file is of; of this project, which of its parts."""
    parts = Path(file).parts
    for root in ("site-packages", "agentweave_bus"):
        if root in parts:
            at = parts.index(root)
            return "/".join(parts[at : at + 2])
    return "/".join(parts[-2:-1]) or file


def install_sampler(report: Path, top: int = 40) -> None:
    """Sample this process from SIGUSR2 until it ends, and write what was found to ``report``."""
    samples = _Samples()

    def begin(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGPROF, samples.note)
        signal.setitimer(signal.ITIMER_PROF, _INTERVAL_S, _INTERVAL_S)

    def end() -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        report.write_text(samples.report(top))

    signal.signal(signal.SIGUSR2, begin)
    atexit.register(end)
