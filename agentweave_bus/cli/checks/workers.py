"""The workers of a running stack: whether each that its file plans was started, and lives."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from agentweave_bus.cli.checks.finding import Finding, failed, ok, warning
from agentweave_bus.cli.exit_codes import ExitCode
from agentweave_bus.embedded.assembly import PlannedAgent

__all__ = ["holder_of", "is_worker", "worker_findings"]

_MODULE: Final = b"agentweave_bus.worker"
_RESTART: Final = "`agentweave supervisor status` says whether it is started again, and why not if it is not."
_NOT_SERVED: Final = "What `agentweave dev` printed says why, and whether it has taken it up since."


def worker_findings(
    agents: Iterable[PlannedAgent], noted: Mapping[str, int], holder: int | None
) -> Iterator[Finding]:
    """Compare the agents of a stack's file with the processes that the running stack noted, by name.

    ``holder`` is the process that holds the stack. Where agents are noted as that one's, it is `agentweave
    dev`, which serves all of them itself.
    """
    planned = list(agents)
    if planned and not noted:
        yield warning("the stack is starting: not every worker is ready yet", "Ask again in a moment.")
        return
    if holder is not None and holder in noted.values() and _lives(holder):
        yield _in_one_process(planned, noted, holder)
        return
    found = [finding for agent in planned for finding in _of_agent(agent, noted)]
    yield from found
    if not found:
        yield ok("the stack is running" + (", and every worker of it" if planned else ""))


def holder_of(state_dir: Path) -> int | None:
    """Return the process that holds the stack in ``state_dir``, by its own word; None where none says so."""
    try:
        first, *_ = (state_dir / "lock").read_text().splitlines() or [""]
    except OSError:
        return None
    return int(first) if first.isdecimal() else None


def _in_one_process(planned: list[PlannedAgent], noted: Mapping[str, int], holder: int) -> Finding:
    """Judge `agentweave dev`: it has each agent once, under its plain name, whatever the file's number is."""
    names = [agent.config.agent.name for agent in planned]
    if absent := [name for name in names if name not in noted]:
        return warning(f"agentweave dev came up without {', '.join(absent)}", _NOT_SERVED)
    return ok(f"the stack is running: agentweave dev came up with every agent of it, in process {holder}")


def _of_agent(agent: PlannedAgent, noted: Mapping[str, int]) -> Iterator[Finding]:
    planned = _places(agent, noted)
    absent = [name for name in planned if name not in noted]
    dead = [name for name in planned if name in noted and not is_worker(noted[name])]
    if absent:
        yield warning(
            f"the running stack was started without {', '.join(absent)}",
            "The file was changed since: start agentweave up again.",
        )
    if not dead:
        return
    gone = ", ".join(f"{name} (process {noted[name]})" for name in dead)
    gone += " has ended" if len(dead) == 1 else " have ended"
    if len(dead) + len(absent) < len(planned):
        yield warning(f"{gone}; other replicas of it go on", _RESTART)
    else:
        yield failed(f"{gone}: nobody serves {agent.spiffe_id}", _RESTART, ExitCode.UNREACHABLE)


def _places(agent: PlannedAgent, noted: Mapping[str, int]) -> tuple[str, ...]:
    """Return the names of an agent's workers: those that there are, where their number changes."""
    there = tuple(name for name in noted if name.rpartition("/")[0] == agent.config.agent.name)
    return there if agent.scales and there else agent.replicas


def is_worker(pid: int) -> bool:
    """Say whether the process ``pid`` lives and is a worker, not another that got its number."""
    if Path("/proc/self/cmdline").exists():
        try:
            return _MODULE in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
    return _lives(pid)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
