"""Worker processes: started together, ready when they say so, stopped in order, and never orphaned.

Each is ``python -m agentweave_bus.worker FILE`` in a session of its own, so that Ctrl-C in a terminal
reaches whoever owns them and not all of them at once. A worker writes ``ready`` on a pipe; what it writes
on standard output and error is handed on line by line. One that ends is reported, not restarted: that is
for :mod:`.supervisor`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from agentweave_bus.exceptions import AgentWeaveError, WorkerError
from agentweave_bus.observability.heartbeat import BEAT_SECONDS, MAX_LINE_BYTES, READY_FD, Heartbeat
from agentweave_bus.observability.last_page import LastPage
from agentweave_bus.supervisor.lifeline import start_child
from agentweave_bus.supervisor.rules import CONFIGURATION_CODE

__all__ = ["WorkerExit", "WorkerProcess", "WorkerProcesses", "WorkerSpec"]

READY_SECONDS: Final = 30.0
STOP_SECONDS: Final = 10.0

_KEPT_LINES: Final = 20
_MAX_LINE_BYTES: Final = 64 * 1024
_REAP_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """One process to run.

    ``name`` is unique and marks its log lines; ``config`` is the agent's YAML; ``class_path``
    (``module:Class``) replaces its ``agent.class``; ``environment`` is added to this process's. It is asked
    to beat every ``beat_s`` seconds; ``None`` is never. ``user`` and ``group`` are numbers; who starts a
    worker as somebody else has to be root.
    """

    name: str
    config: Path
    class_path: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    beat_s: float | None = None
    user: int | None = None
    group: int | None = None

    def rights(self) -> dict[str, Any]:
        """Return as whom it runs, for the system; with none of the starter's other groups."""
        if self.user is None and self.group is None:
            return {}
        return {"user": self.user, "group": self.group, "extra_groups": []}

    def whom(self) -> str:
        """Return as whom it runs, for people."""
        return f" as user {self.user}, group {self.group}" if self.rights() else ""

    def variables(self) -> dict[str, str]:
        """Return the environment in which it runs."""
        beats = {} if self.beat_s is None else {BEAT_SECONDS: str(self.beat_s)}
        return {**os.environ, **self.environment, **beats}

    def command(self) -> list[str]:
        """Return what is run."""
        command = [sys.executable, "-m", "agentweave_bus.worker", str(self.config)]
        return command if self.class_path is None else [*command, "--class", self.class_path]


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """A worker that ended; ``code`` is its exit code, or minus the signal's number that killed it."""

    name: str
    code: int
    last_lines: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {_how(self.code)}"


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:  # most real-time signals have no name
        return f"was ended by signal {-code}"


class WorkerProcess:
    """One running worker. Made by :class:`WorkerProcesses` or a supervisor.

    ``on_line(name, line)`` gets what it writes, ``on_news()`` is called when it has beaten or ended,
    ``on_counted(process id, page)`` gets the page of its metrics as it ends.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        on_line: Callable[[str, str], None],
        on_news: Callable[[], None] = lambda: None,
        on_counted: Callable[[int, str], None] = lambda _pid, _page: None,
    ) -> None:
        self.spec = spec
        self.beat: Heartbeat | None = None
        """The last one."""
        self.heard_at = 0.0
        """When it last said anything on its pipe, by the loop's clock in seconds."""
        self.started_at = 0.0
        self.drain_s = STOP_SECONDS
        """How long it has for what it is doing when it is told to end."""
        self._on_news = on_news
        self._on_counted = on_counted
        self._last_page = LastPage()
        self._hearing: asyncio.Task[None] | None = None
        self.metrics_url: str | None = None
        """Where its metrics are, once it is ready; ``None`` when it has no listener."""
        self._on_line = on_line
        self._process: asyncio.subprocess.Process | None = None
        self._group_ended = False
        self._told: signal.Signals | None = None
        """What it was told before there was a process."""
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._reader: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        """The process id. Raises WorkerError before the start."""
        return self._started().pid

    @property
    def started(self) -> bool:
        """Whether there is a process, dead or alive."""
        return self._process is not None

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.returncode is None

    async def start(self, deadline_s: float) -> None:
        """Start the process and wait until it is ready to take calls.

        Raises:
            WorkerError: it could not be started, ended instead, or was not ready in time; the message ends
                with its last words.

        """
        pipes: list[int] = []
        try:
            pipes += os.pipe()
            # A pipe of our own: to wait for a process with one of asyncio's is to wait for its children, too.
            pipes += os.pipe()
            ready_read, ready_write, lines_read, lines_write = pipes
            self._process = await start_child(
                self.spec.command(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=lines_write,
                stderr=asyncio.subprocess.STDOUT,
                env={**self.spec.variables(), READY_FD: str(ready_write)},
                pass_fds=(ready_write,),
                start_new_session=True,
                **self.spec.rights(),
            )
        except BaseException as error:
            for one in pipes:
                os.close(one)
            if not isinstance(error, OSError):
                raise
            code = CONFIGURATION_CODE if isinstance(error, PermissionError) else None
            raise self._failed(f"can't be started{self.spec.whom()}: {error.strerror}", code) from error
        os.close(ready_write)
        os.close(lines_write)
        if self._told is not None:
            self._signal(self._told)
        self.started_at = asyncio.get_running_loop().time()
        try:
            said, said_transport = await _reading(lines_read, _MAX_LINE_BYTES)
        except BaseException:
            os.close(ready_read)
            raise
        self._reader = asyncio.create_task(
            self._read_lines(said, said_transport), name=f"{self.spec.name} log"
        )
        await self._await_ready(ready_read, deadline_s)

    async def wait(self) -> WorkerExit:
        """Wait until it has ended and all that it wrote and said was taken; its children end with it."""
        process = self._started()
        code = await process.wait()
        if not self._group_ended:  # later its number may be that of others
            self._group_ended = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # it was started in a session of its own
        for reader in (self._reader, self._hearing):
            if reader is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(reader), _REAP_SECONDS)
        return WorkerExit(self.spec.name, code, tuple(self._lines))

    def terminate(self) -> None:
        """Ask it to finish what it does and end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._signal(signal.SIGKILL)

    async def end(self, stop_s: float) -> None:
        """Ask it to end, kill it when it has not after ``stop_s`` seconds, and reap it."""
        if self._process is None:
            return
        self.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), stop_s)
        self.kill()
        await self.wait()
        readers = [one for one in (self._reader, self._hearing) if one is not None]
        for one in readers:
            one.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

    def _started(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise WorkerError(f"{self.spec.name} was not started", name=self.spec.name)
        return self._process

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            self._told = number
        elif self.running:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _await_ready(self, read_fd: int, deadline_s: float) -> None:
        reader, transport = await _reading(read_fd, MAX_LINE_BYTES)
        try:
            line = (await asyncio.wait_for(reader.readline(), deadline_s)).decode(errors="replace")
        except TimeoutError:
            transport.close()
            raise self._failed(f"was not ready within {deadline_s:g} s") from None
        except ValueError:
            line = "a line that is too long"
        except BaseException:
            transport.close()
            raise
        word, _, url = line.strip().partition(" ")
        if word != "ready":
            transport.close()
            raise await self._not_ready() if not line else self._failed("said something else than ready")
        self.metrics_url = url or None
        self.heard_at = asyncio.get_running_loop().time()
        self._hearing = asyncio.create_task(self._hear(reader, transport), name=f"{self.spec.name} beats")

    async def _hear(self, reader: asyncio.StreamReader, transport: asyncio.ReadTransport) -> None:
        """Take note of beats until the worker closes its pipe, which it does with its end."""
        try:
            while line := await reader.readline():
                word, _, told = line.decode(errors="replace").partition(" ")
                if word == "beat":
                    self.beat = Heartbeat.read(told)
                    self.heard_at = asyncio.get_running_loop().time()
                    self._on_news()
                elif word == "metrics":
                    self._last_page.add(told)
                elif word == "counted" and (page := self._last_page.whole(told)) is not None:
                    self._on_counted(self.pid, page)
        except ValueError as error:  # then it counts as silent
            self._on_line(self.spec.name, f"(its heartbeat can't be read: {error})")
        finally:
            transport.close()
            self._on_news()

    async def _not_ready(self) -> WorkerError:
        try:
            ended = await asyncio.wait_for(self.wait(), _REAP_SECONDS)
        except TimeoutError:
            return self._failed("closed its ready pipe without being ready")
        return self._failed(f"{_how(ended.code)} instead of becoming ready", ended.code)

    def _failed(self, what: str, code: int | None = None) -> WorkerError:
        words = "".join(f"\n  {line}" for line in list(self._lines)[-8:])
        said = f"; it said last:{words}" if words else ""
        return WorkerError(f"{self.spec.name} {what}{said}", name=self.spec.name, exit_code=code)

    async def _read_lines(self, stream: asyncio.StreamReader, transport: asyncio.ReadTransport) -> None:
        try:
            while True:
                try:
                    raw = await stream.readline()
                except ValueError:  # beyond the limit; the reader has dropped it
                    raw = b"(a line was too long to be shown)\n"
                if not raw:
                    return
                line = raw.decode(errors="replace").rstrip()
                self._lines.append(line)
                self._on_line(self.spec.name, line)
        finally:
            transport.close()


async def _reading(descriptor: int, limit_bytes: int) -> tuple[asyncio.StreamReader, asyncio.ReadTransport]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit_bytes)
    pipe = os.fdopen(descriptor, "rb", buffering=0)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader, transport


class WorkerProcesses:
    """The workers of one stack; an async context manager that leaves none behind.

    ``on_line(name, line)`` gets what they write; it must not block for long.
    """

    def __init__(
        self,
        on_line: Callable[[str, str], None],
        *,
        ready_s: float = READY_SECONDS,
        stop_s: float = STOP_SECONDS,
    ) -> None:
        self._on_line = on_line
        self._ready_s = ready_s
        self._stop_s = stop_s
        self._workers: dict[str, WorkerProcess] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def __getitem__(self, name: str) -> WorkerProcess:
        return self._workers[name]

    @property
    def all(self) -> tuple[WorkerProcess, ...]:
        """Every worker that was started, in that order."""
        return tuple(self._workers.values())

    async def start(self, specs: Iterable[WorkerSpec]) -> None:
        """Start them at the same time and wait until all are ready.

        Raises:
            WorkerError: one is not; the others go on until the block is left.

        """
        workers = [WorkerProcess(spec, self._on_line) for spec in specs]
        for worker in workers:
            if worker.spec.name in self._workers:
                raise AgentWeaveError(f"there is a worker called {worker.spec.name} already")
            self._workers[worker.spec.name] = worker
        starting = [asyncio.create_task(worker.start(self._ready_s)) for worker in workers]
        try:
            for started in asyncio.as_completed(starting):
                await started
        finally:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)

    async def stop(self) -> None:
        """Ask all to end, wait, kill those that have not, and reap them."""
        await asyncio.gather(*(worker.end(self._stop_s) for worker in self._workers.values()))
        self._workers.clear()

    def kill(self) -> None:
        """End all at once; :meth:`stop` still has to reap them."""
        for worker in self._workers.values():
            worker.kill()
