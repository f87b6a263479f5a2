"""Workers are started together, heard, reported and stopped; each one here is a real process.

What serves calls is played by a small program in place of ``agentweave_bus.worker``, so that it can
misbehave; the real one runs in tests/integration/test_cli_up.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest

from agentweave_bus.exceptions import AgentWeaveError, WorkerError
from agentweave_bus.supervisor import worker_process as processes
from agentweave_bus.supervisor.worker_process import WorkerProcess, WorkerProcesses, WorkerSpec

pytestmark = pytest.mark.anyio

READY = (
    "import os; os.write(int(os.environ['AGENTWEAVE_READY_FD']), b'ready http://127.0.0.1:1/metrics\\n')\n"
)
SLEEP = "import time; time.sleep(60)\n"


class Program(WorkerSpec):
    """A worker whose program is the text in its ``class_path``."""

    def command(self) -> list[str]:
        assert self.class_path is not None
        return [sys.executable, "-c", self.class_path]


def program(name: str, *code: str, **environment: str) -> WorkerSpec:
    return Program(name=name, config=Path("x.yaml"), class_path="".join(code), environment=environment)


@pytest.fixture
def lines() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def heard(lines: list[tuple[str, str]]) -> Callable[[str, str], None]:
    return lambda name, line: lines.append((name, line))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_ready_heard_and_stopped(lines: list, heard: Callable) -> None:
    async with WorkerProcesses(heard) as workers:
        speak = "import os, sys; print(os.environ['MARK'], file=sys.stderr, flush=True)\n"
        await workers.start([program("a", speak, READY, SLEEP, MARK="hello"), program("b", READY, SLEEP)])
        pids = [worker.pid for worker in workers.all]
        assert workers["a"].running
        assert workers["a"].metrics_url == "http://127.0.0.1:1/metrics"
        assert all(os.getsid(pid) == pid for pid in pids)  # a terminal's Ctrl-C does not reach them
    assert lines == [("a", "hello")]
    assert not any(alive(pid) for pid in pids)


async def test_one_that_ends_instead_of_becoming_ready(heard: Callable) -> None:
    async with WorkerProcesses(heard) as workers:
        with pytest.raises(WorkerError, match=r"(?s)b ended with exit code 3 instead.*last words") as caught:
            await workers.start([program("a", READY, SLEEP), program("b", "print('last words'); exit(3)")])
        assert (caught.value.name, caught.value.exit_code) == ("b", 3)
        pid = workers["a"].pid
    assert not alive(pid)


async def test_one_that_is_never_ready(heard: Callable) -> None:
    async with WorkerProcesses(heard, ready_s=0.3) as workers:
        with pytest.raises(WorkerError, match=r"a was not ready within 0\.3 s"):
            await workers.start([program("a", SLEEP)])


async def test_one_that_ends_later_is_reported(heard: Callable) -> None:
    async with WorkerProcesses(heard) as workers:
        await workers.start([program("a", READY, SLEEP), program("b", READY, "print('bye')")])
        ended = await asyncio.wait_for(workers["b"].wait(), 30)
        assert (ended.name, ended.code, ended.last_lines) == ("b", 0, ("bye",))
        os.kill(workers["a"].pid, signal.SIGKILL)
        assert str(await asyncio.wait_for(workers["a"].wait(), 30)) == "a was ended by SIGKILL"


async def test_what_is_left_of_it_is_ended_once(heard: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be that of others by the time that it is waited for again."""
    ended: list[int] = []
    real = os.killpg
    monkeypatch.setattr(os, "killpg", lambda pid, number: (ended.append(pid), real(pid, number)))
    async with WorkerProcesses(heard) as workers:
        await workers.start([program("a", READY)])
        pid = workers["a"].pid
        first = await asyncio.wait_for(workers["a"].wait(), 30)
        assert await workers["a"].wait() == first
    assert ended == [pid]


async def test_a_start_that_is_given_up_leaves_no_process_and_no_file(heard: Callable) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    await started_for(heard, 1)  # what a first one needs stays: the loop's own
    before = descriptors()
    for turns in range(12):
        await started_for(heard, turns)
    assert descriptors() == before


async def started_for(heard: Callable, turns: int) -> None:
    """Start one and give it up after so many turns of the loop."""
    worker = WorkerProcess(program("a", SLEEP), heard)
    async with anyio.create_task_group() as group:
        group.start_soon(worker.start, 30.0)
        for _ in range(turns):
            await asyncio.sleep(0)
        group.cancel_scope.cancel()
    pid = worker.pid if worker.started else None
    with anyio.fail_after(30):
        await worker.end(0)
    assert pid is None or not alive(pid)


async def test_one_that_ignores_sigterm_is_killed(heard: Callable) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    began = time.monotonic()
    async with WorkerProcesses(heard, stop_s=0.3) as workers:
        await workers.start([program("a", stubborn, READY, SLEEP)])
        pid = workers["a"].pid
    assert not alive(pid)
    assert time.monotonic() - began < 20


async def test_stopped_also_when_cancelled(heard: Callable) -> None:
    pids: list[int] = []
    started = asyncio.Event()

    async def hold() -> None:
        async with WorkerProcesses(heard) as workers:
            await workers.start([program("a", READY, SLEEP)])
            pids.append(workers["a"].pid)
            started.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    await asyncio.wait_for(started.wait(), 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(pids[0])


async def test_a_line_beyond_the_bound_does_not_end_the_listening(
    lines: list, heard: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_MAX_LINE_BYTES", 1024)
    async with WorkerProcesses(heard) as workers:
        await workers.start([program("a", "print('x' * 9000); print('after', flush=True)\n", READY, SLEEP)])
    assert lines[-1] == ("a", "after")
    assert ("a", "(a line was too long to be shown)") in lines


async def test_a_name_is_used_once(heard: Callable) -> None:
    async with WorkerProcesses(heard) as workers:
        with pytest.raises(AgentWeaveError, match="a worker called a already"):
            await workers.start([program("a", READY, SLEEP), program("a", READY, SLEEP)])


def test_what_is_run() -> None:
    spec = WorkerSpec(name="a", config=Path("a.yaml"), class_path="m:C")
    assert spec.command()[1:] == ["-m", "agentweave_bus.worker", "a.yaml", "--class", "m:C"]
