"""The doctor's look at the workers of a running stack: real processes, living and killed."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentweave_bus.cli.checks.finding import Status
from agentweave_bus.cli.checks.patient import examine
from agentweave_bus.cli.checks.workers import holder_of, is_worker, worker_findings
from agentweave_bus.cli.doctor import Doctor
from agentweave_bus.config import load_stack
from agentweave_bus.embedded.assembly import noted_workers, plan_agents

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process that only waits, and looks like a worker unless told otherwise."""
    begun: list[subprocess.Popen[bytes]] = []

    def begin(module: str = "agentweave_bus.worker") -> subprocess.Popen[bytes]:
        waits = [sys.executable, "-I", "-S", "-c", "print(flush=True); input()", module]
        begun.append(subprocess.Popen(waits, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert begun[-1].stdout is not None
        begun[-1].stdout.readline()  # it runs
        return begun[-1]

    yield begin
    for one in begun:
        one.communicate(b"\n", timeout=10)


@pytest.fixture
def lock(place: Path) -> Iterator[Path]:
    """A stack of two agents, one of them twice, whose lock is held."""
    entries = "agents: [{config: baker.yaml}, {config: miller.yaml, replicas: 2}]\n"
    (place / "agentweave.yaml").write_text(f"trust_domain: shop.test\ngrants: grants.yaml\n{entries}")
    for name in ("baker", "miller"):
        (place / f"{name}.yaml").write_text(
            f"agent: {{name: {name}, trust_domain: shop.test, class: 'a:B'}}\n"
        )
    path = place / ".agentweave" / "lock"
    path.parent.mkdir()
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield path


def note(lock: Path, **workers: int) -> None:
    lines = "".join(f"{name.replace('_', '/')} {pid}\n" for name, pid in workers.items())
    lock.write_text(f"1\n/run/agentweave-x\n{lines}")


def seen(place: Path) -> list[tuple[str, str, int]]:
    state = place / ".agentweave"
    findings = worker_findings(plan_agents(load_stack()), noted_workers(state), holder_of(state))
    return [(one.status.value, one.found, int(one.code)) for one in findings]


def test_every_worker_lives(lock: Path, start: Start) -> None:
    pid = start().pid
    note(lock, baker=pid, miller_1=pid, miller_2=pid)
    assert seen(lock.parents[1]) == [("ok", "the stack is running, and every worker of it", 0)]


def test_an_agent_that_was_killed(lock: Path, start: Start) -> None:
    alive, killed = start().pid, start()
    killed.kill()
    killed.wait(10)
    note(lock, baker=killed.pid, miller_1=killed.pid, miller_2=alive)
    who = f"(process {killed.pid}) has ended"
    assert seen(lock.parents[1]) == [
        ("failed", f"baker {who}: nobody serves spiffe://shop.test/agent/baker", 4),
        ("warning", f"miller/1 {who}; other replicas of it go on", 0),
    ]


def test_a_process_that_got_the_number_of_a_worker_is_none(start: Start) -> None:
    assert is_worker(start().pid)
    assert not is_worker(start("agentweave_bus.workers").pid)


def test_a_worker_that_the_running_stack_does_not_have_yet(lock: Path, start: Start) -> None:
    lock.write_text("1\n/run/agentweave-x\n")
    assert seen(lock.parents[1])[0][:2] == ("warning", "the stack is starting: not every worker is ready yet")
    note(lock, miller_1=(pid := start().pid), miller_2=pid)
    assert seen(lock.parents[1]) == [("warning", "the running stack was started without baker", 0)]


def test_an_agent_whose_number_of_workers_follows_the_load(lock: Path, start: Start) -> None:
    """Those count that there are, whichever they are."""
    file = lock.parents[1] / "agentweave.yaml"
    file.write_text(file.read_text().replace("replicas: 2", "min: 1, max: 4"))
    pid, killed = start().pid, start()
    killed.kill()
    killed.wait(10)
    note(lock, baker=pid, miller_2=pid, miller_3=pid)
    assert seen(lock.parents[1]) == [("ok", "the stack is running, and every worker of it", 0)]
    note(lock, baker=pid, miller_2=pid, miller_3=killed.pid)
    gone = f"miller/3 (process {killed.pid}) has ended; other replicas of it go on"
    assert seen(lock.parents[1]) == [("warning", gone, 0)]
    note(lock, baker=pid)
    assert seen(lock.parents[1]) == [("warning", "the running stack was started without miller/1", 0)]


def test_agents_that_all_live_in_the_process_that_holds_the_stack(lock: Path, start: Start) -> None:
    """As in `agentweave dev`, which has each agent once, whatever the file says of replicas."""
    holder = start("agentweave").pid
    lock.write_text(f"{holder}\n/run/agentweave-x\nbaker {holder}\nmiller {holder}\n")
    told = f"the stack is running: agentweave dev came up with every agent of it, in process {holder}"
    assert seen(lock.parents[1]) == [("ok", told, 0)]
    lock.write_text(f"{holder}\n/run/agentweave-x\nbaker {holder}\n")
    assert seen(lock.parents[1]) == [("warning", "agentweave dev came up without miller", 0)]


def test_a_process_that_held_the_stack_and_is_gone(lock: Path, start: Start) -> None:
    killed = start("agentweave")
    killed.kill()
    killed.wait(10)
    lock.write_text(f"{killed.pid}\n/run/agentweave-x\nbaker {killed.pid}\nmiller {killed.pid}\n")
    assert "failed" in [status for status, _, _ in seen(lock.parents[1])]


@pytest.mark.anyio
async def test_the_doctor_says_so(lock: Path, start: Start) -> None:
    alive, killed = start().pid, start()
    killed.kill()
    killed.wait(10)
    note(lock, baker=killed.pid, miller_1=alive, miller_2=alive)
    async with Doctor.of(examine(None, None, None), seconds=1.0) as doctor:
        (check,) = [one for one in doctor.checks() if one.name == "stack"]
        (finding,) = await check.look()
    assert finding.status is Status.FAILED
    assert "baker" in finding.found
    assert "agentweave supervisor status" in finding.advice
