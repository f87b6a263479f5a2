"""What the demo writes: one check after the other, what was tried, what came out, and why."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, TextIO

__all__ = ["Check", "DidNotHappenError", "Exact", "Screen", "short"]

_GREEN, _RED, _BOLD, _DIM, _PLAIN = ("\x1b[32m", "\x1b[31m", "\x1b[1m", "\x1b[2m", "\x1b[0m")
_INDENT: Final = " " * 6
_AGENT: Final = re.compile(r"spiffe://[a-z0-9.]+/(?:agent/)?([\w/-]+)")
_UUID: Final = re.compile(r"\b([0-9a-f]{8})-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
_AUDIT_ID: Final = re.compile(r"\b([0-9a-f]{6})[0-9a-f]{26}(-\d+)\b")


class Exact(str):
    """A line that is written as it is, ids in full: for what a reader may want to copy."""

    __slots__ = ()


class DidNotHappenError(Exception):
    """Something that the demo promises did not happen."""


@dataclass(slots=True)
class Check:
    """One thing that is tried: what it was, what came out, and lines that say more."""

    tried: str
    outcome: str = ""
    lines: list[str] = field(default_factory=list)

    def came_out(self, outcome: str, *lines: str) -> None:
        """Note the outcome, and lines below it."""
        self.outcome = outcome
        self.lines += lines

    @staticmethod
    def must(condition: bool, otherwise: str) -> None:
        """Go on only if ``condition`` holds; ``otherwise`` says what is wrong.

        Raises:
            DidNotHappenError: it does not.

        """
        if not condition:
            raise DidNotHappenError(otherwise)


class Screen:
    """Writes to ``out``; in colour only where that is a terminal."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._colour = out.isatty()
        self._scenes = 0
        self.passed = 0

    def title(self, text: str) -> None:
        """Write the first line, or the last."""
        self._line(self._paint(_BOLD, text))

    def scene(self, text: str) -> None:
        """Begin a numbered part."""
        self._scenes += 1
        self._line("")
        self._line(self._paint(_BOLD, f"{self._scenes}  {text}"))

    def line(self, text: str) -> None:
        """Write a line as it is, ids and addresses in full."""
        self._line(_INDENT + text)

    @contextmanager
    def check(self, tried: str) -> Iterator[Check]:
        """Write one check when its block ends: ``ok``, or ``FAILED`` when it raises."""
        check = Check(tried)
        try:
            yield check
        except Exception as error:
            self._line(f"  {self._paint(_RED, 'FAILED')}  {short(tried)}")
            self._line(f"{_INDENT}  {short(str(error)) or type(error).__name__}")
            raise
        self.passed += 1
        self._write(check)

    def _write(self, check: Check) -> None:
        mark = self._paint(_GREEN, "ok")
        self._line(f"  {mark}  {short(check.tried):<49}  {short(check.outcome)}".rstrip())
        for line in check.lines:
            self._line(_INDENT + self._paint(_DIM, line if isinstance(line, Exact) else short(line)))

    def _paint(self, colour: str, text: str) -> str:
        return f"{colour}{text}{_PLAIN}" if self._colour else text

    def _line(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()


def short(text: str) -> str:
    """Cut ids to what a reader can compare: ``spiffe://agentweave.io/agent/order`` is ``order``."""
    text = _AGENT.sub(r"\1", text)
    text = _AUDIT_ID.sub(r"\1…\2", text)
    return _UUID.sub(r"\1…", text)
