"""Asking a running supervisor: a unix socket that its own user alone can open.

One request a connection, a line of JSON each way. Who may open the socket may do what the supervisor's user
may, which is to signal its processes anyway; nothing about tasks can be asked here.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError, UnreachableError

__all__ = ["SOCKET_NAME", "ask_supervisor", "control_socket"]

_log = logging.getLogger(__name__)

SOCKET_NAME: Final = "supervisor.sock"

_MAX_BYTES: Final = 1024 * 1024
_REQUEST_S: Final = 5.0
_MOST_AT_ONCE: Final = 16
_CREDENTIALS: Final = struct.Struct("3i")
"""As Linux tells them: process, user, group."""

Answer = Callable[[Mapping[str, Any]], Awaitable[Any]]


@asynccontextmanager
async def control_socket(path: Path, answer: Answer) -> AsyncIterator[None]:
    """Answer requests at ``path`` for the length of the block; it is removed at the end.

    One supervisor has it at a time: a lock on the file beside it ends with the process, however that ends.
    ``answer`` gets what was asked, an object, and returns what is answered, any JSON; an
    :class:`~agentweave_bus.exceptions.AgentWeaveError` is told to who asked.

    Raises:
        ConfigurationError: another supervisor is there.

    """
    places = asyncio.Semaphore(_MOST_AT_ONCE)
    asking: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # asyncio runs each connection in one
        asking.add(task)
        try:
            async with places:
                told = await _answered(reader, answer)
                writer.write(json.dumps(told).encode() + b"\n")
                async with asyncio.timeout(_REQUEST_S):
                    await writer.drain()
        except (OSError, TimeoutError):
            pass  # who asked has gone
        finally:
            asking.discard(task)
            writer.close()

    with _alone(path):
        server = await asyncio.start_unix_server(connected, sock=_bound(path), limit=_MAX_BYTES)
        try:
            yield
        finally:
            server.close()
            path.unlink(missing_ok=True)  # noqa: ASYNC240 - a name in a directory of our own
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)


async def ask_supervisor(path: Path, request: Mapping[str, Any], timeout_s: float) -> Any:
    """Ask the supervisor at ``path`` and return its answer, within ``timeout_s`` seconds.

    Raises:
        UnreachableError: nobody answers there.
        ConfigurationError: what it was asked, or a file that it was to read, is wrong.
        AgentWeaveError: it can't do what it was asked; the message says why.

    """
    try:
        async with asyncio.timeout(timeout_s):
            with _reachable(path) as short:
                reader, writer = await asyncio.open_unix_connection(short, limit=_MAX_BYTES)
            try:
                _check_who_answers(writer, path)
                writer.write(json.dumps(request).encode() + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
        told = json.loads(line)
    except PermissionError as error:
        raise UnreachableError(f"{path} is another user's: only that one may ask the supervisor") from error
    except TimeoutError as error:
        raise UnreachableError(f"the supervisor at {path} does not answer within {timeout_s:g} s") from error
    except (OSError, ValueError, RecursionError) as error:  # the last of JSON that is nested too deep
        raise UnreachableError(f"no supervisor answers at {path}: is one running there?") from error
    if "error" in told:
        raise (ConfigurationError if told.get("configuration") else AgentWeaveError)(told["error"])
    return told["answer"]


def _check_who_answers(writer: asyncio.StreamWriter, path: Path) -> None:
    """Refuse somebody who could put a socket there only because others may write to the directory."""
    credentials = writer.get_extra_info("socket").getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
    )
    _, user, _ = _CREDENTIALS.unpack(credentials)
    if user not in {0, os.geteuid(), path.parent.stat().st_uid}:
        raise UnreachableError(f"user {user} answers at {path}, whose directory is not that user's")


async def _answered(reader: asyncio.StreamReader, answer: Answer) -> dict[str, Any]:
    try:
        async with asyncio.timeout(_REQUEST_S):
            request = json.loads(await reader.readline())
    except (TimeoutError, ValueError, RecursionError):  # the last of JSON that is nested too deep
        return {"error": "that is no request"}
    if not isinstance(request, dict):
        return {"error": "that is no request"}
    doing = asyncio.ensure_future(answer(request))
    gone = asyncio.ensure_future(reader.read(1))  # who asks says no more, but may go
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ConnectionResetError("who asked has gone")  # noqa: TRY301
        return {"answer": doing.result()}
    except AgentWeaveError as error:
        return {"error": str(error), "configuration": isinstance(error, ConfigurationError)}
    except OSError:
        raise
    except Exception:  # noqa: BLE001 - a request must not end who answers it
        _log.exception("a request failed in a way that nobody foresaw")
        return {"error": "it failed in a way that nobody foresaw; the supervisor's log says more"}
    finally:
        doing.cancel()
        gone.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    with open(descriptor, "a") as file:  # noqa: PTH123 - it is open, for its owner alone
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(
                f"Another supervisor is at {path}.",
                key="state_dir",
                hint="Stop that one, or name another directory with --state-dir.",
            ) from None
        yield


def _bound(path: Path) -> socket.socket:
    """Bind a socket that only this user can open, from its first moment on."""
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()  # of a supervisor that was killed: the lock is ours
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        with _reachable(path) as short:
            made.bind(short)
    except BaseException:
        made.close()
        raise
    finally:
        os.umask(before)
    return made


@contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """Yield a name of ``path`` that is short enough for a socket's address, whatever directory it lies in."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
