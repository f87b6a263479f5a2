"""What a check finds, and running checks one after another, each for a bounded time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

import anyio

from agentweave_bus.cli.exit_codes import ExitCode, exit_code_of, single_error
from agentweave_bus.exceptions import AgentWeaveError

__all__ = ["Check", "Finding", "Status", "exit_code", "failed", "ok", "run_checks", "skipped", "warning"]


class Status(StrEnum):
    """How it stands."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: how it stands, what it is, what to do, and the exit code that it counts for."""

    status: Status
    found: str
    advice: str = ""
    code: ExitCode = ExitCode.DONE


def ok(found: str) -> Finding:
    """Return that all is well."""
    return Finding(Status.OK, found)


def warning(found: str, advice: str) -> Finding:
    """Return what works and should be known."""
    return Finding(Status.WARNING, found, advice)


def failed(found: str, advice: str, code: ExitCode = ExitCode.USAGE) -> Finding:
    """Return what does not work; ``code`` as of the command that would fail by it."""
    return Finding(Status.FAILED, found, advice, code)


def skipped(found: str) -> Finding:
    """Return why something could not be looked at."""
    return Finding(Status.SKIPPED, found)


@dataclass(frozen=True, slots=True)
class Check:
    """One named check. ``look`` may raise this package's errors: they are findings."""

    name: str
    look: Callable[[], Awaitable[Iterable[Finding]]]


async def run_checks(checks: Iterable[Check], *, deadline_s: float) -> AsyncIterator[tuple[str, Finding]]:
    """Run ``checks`` in order, each for ``deadline_s`` seconds at most, and yield what each finds."""
    for check in checks:
        for finding in await _findings(check, deadline_s):
            yield check.name, finding


async def _findings(check: Check, deadline_s: float) -> list[Finding]:
    try:
        with anyio.fail_after(deadline_s):
            return list(await check.look())
    except TimeoutError:
        text = f"no end of it within {deadline_s:g} s"
        return [failed(text, "Give it longer with --timeout, or find what hangs.", ExitCode.UNREACHABLE)]
    except Exception as raised:  # noqa: BLE001 - a check that fails must not keep the others from being made
        error = single_error(raised)
        if isinstance(error, AgentWeaveError):
            return [failed(str(error), "", exit_code_of(error))]
        return [failed(f"this could not be looked at: {type(error).__name__}: {error}", "", ExitCode.USAGE)]


def exit_code(findings: Iterable[Finding]) -> ExitCode:
    """Return the code of all: 0 when nothing failed, else the smallest, which is to be put right first."""
    return min((one.code for one in findings if one.status is Status.FAILED), default=ExitCode.DONE)
