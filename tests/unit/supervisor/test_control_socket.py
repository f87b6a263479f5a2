"""Asking a supervisor over its socket: who may, what comes of it, and of those who go."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError, UnreachableError
from agentweave_bus.supervisor.control_socket import ask_supervisor, control_socket

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ("a" * 120) / "supervisor.sock"  # longer than a socket's address may be


NOBODY = 65534
PYTHON = Path("/usr/bin/python3")  # other users can't read that of a test's environment
FAKE = """
import socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
print("listening", flush=True)
while True:
    asking, _ = server.accept()
    asking.recv(1000)
    try:
        asking.sendall(b'{"answer": "of nobody"}\\n')
    except BrokenPipeError:
        pass
    asking.close()
"""


class Answering:
    def __init__(self) -> None:
        self.begun, self.cancelled = asyncio.Event(), asyncio.Event()

    async def __call__(self, request: Mapping[str, Any]) -> Any:
        if request["do"] == "wait":
            self.begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        if request["do"] == "refuse":
            raise AgentWeaveError("not that")
        return {"asked": request["do"]}


async def test_it_answers_its_own_user_alone(path: Path) -> None:
    async with control_socket(path, Answering()):
        assert [oct(one.stat().st_mode)[-3:] for one in (path, path.with_suffix(".lock"))] == ["600", "600"]
        assert await ask_supervisor(path, {"do": "status"}, 5) == {"asked": "status"}
        with pytest.raises(AgentWeaveError, match="not that"):
            await ask_supervisor(path, {"do": "refuse"}, 5)
        with pytest.raises(AgentWeaveError, match="the supervisor's log says more"):
            await ask_supervisor(path, {}, 5)  # the answering one stumbles
        assert await ask_supervisor(path, {"do": "again"}, 5) == {"asked": "again"}
    assert not path.exists()  # noqa: ASYNC240
    with pytest.raises(UnreachableError, match="is one running there"):
        await ask_supervisor(path, {"do": "status"}, 5)


async def test_one_at_a_time_and_what_a_killed_one_left_is_no_obstacle(path: Path) -> None:
    async with control_socket(path, Answering()):
        with pytest.raises(ConfigurationError, match="Another supervisor"):
            async with control_socket(path, Answering()):
                pass
        assert await ask_supervisor(path, {"do": "status"}, 5) == {"asked": "status"}
        left = path.with_name("left")
        path.rename(left)  # noqa: ASYNC240
    left.rename(path)
    async with control_socket(path, Answering()):
        assert await ask_supervisor(path, {"do": "status"}, 5) == {"asked": "status"}


async def test_what_nobody_waits_for_any_more_is_not_done(path: Path) -> None:
    answering = Answering()
    async with control_socket(path, answering):
        with pytest.raises(UnreachableError, match="does not answer within"):
            await ask_supervisor(path, {"do": "wait"}, 0.3)
        async with asyncio.timeout(30):
            await answering.cancelled.wait()


async def test_it_ends_with_requests_under_way(path: Path) -> None:
    answering = Answering()
    async with asyncio.timeout(30), control_socket(path, answering):
        asking = asyncio.ensure_future(ask_supervisor(path, {"do": "wait"}, 30))
        await answering.begun.wait()
    assert answering.cancelled.is_set()
    with pytest.raises(UnreachableError):
        await asking


DEEP = b"[" * 100_000 + b"\n"
"""JSON that Python's parser gives up on with another error than for what is none."""


@pytest.mark.parametrize("line", [DEEP, b"{\n", b"[]\n"], ids=["deep", "broken", "no object"])
async def test_what_is_no_request_is_told_so(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "supervisor.sock"
    async with asyncio.timeout(30), control_socket(path, Answering()):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(line)
        assert await reader.readline() == b'{"error": "that is no request"}\n'
        writer.close()
        assert await ask_supervisor(path, {"do": "status"}, 30) == {"asked": "status"}
    assert not caplog.records


@pytest.mark.parametrize("line", [DEEP, b"{\n"], ids=["deep", "broken"])
async def test_what_is_no_answer_is_none_of_a_supervisor(tmp_path: Path, line: bytes) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(line)
        writer.close()

    path = tmp_path / "supervisor.sock"
    async with await asyncio.start_unix_server(connected, path):
        with pytest.raises(UnreachableError, match="is one running there"):
            await ask_supervisor(path, {"do": "status"}, 30)


@pytest.fixture
def of_nobody() -> Iterator[Path]:
    """A socket that another user has put into a directory where everybody may write."""
    if os.geteuid() != 0 or not PYTHON.exists():
        pytest.skip(f"only root can be another user, with {PYTHON}")
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as directory:
        Path(directory).chmod(0o777)
        path = Path(directory) / "supervisor.sock"
        with subprocess.Popen([PYTHON, "-c", FAKE, path], stdout=subprocess.PIPE, user=NOBODY) as fake:
            assert fake.stdout is not None
            fake.stdout.readline()
            yield path
            fake.kill()


async def test_who_has_only_a_socket_in_an_open_directory_is_not_believed(of_nobody: Path) -> None:
    with pytest.raises(UnreachableError, match=f"user {NOBODY} answers"):
        await ask_supervisor(of_nobody, {"do": "status"}, 5)
    os.chown(of_nobody.parent, NOBODY, NOBODY)
    assert await ask_supervisor(of_nobody, {"do": "status"}, 5) == "of nobody"
