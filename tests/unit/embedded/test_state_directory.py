"""What `agentweave up` removes after a killed predecessor, and what it never touches."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from agentweave_bus.embedded.state_directory import StateLock, _clear_after, keep_out_of_git, locked


def socket_at(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


@pytest.fixture
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "agentweave-x1"
    directory.mkdir()
    monkeypatch.chdir(directory)  # a socket's path may have 107 bytes
    socket_at(Path("one.sock"))
    return directory


def test_a_socket_directory_that_the_lock_names_is_removed(tmp_path: Path, sockets: Path) -> None:
    _clear_after(f"17\n{sockets}\n", tmp_path)
    assert not sockets.exists()


def test_files_in_it_are_never_removed(tmp_path: Path, sockets: Path) -> None:
    (sockets / "letter").write_text("mine")
    _clear_after(f"17\n{sockets}\n", tmp_path)
    assert [path.name for path in sockets.iterdir()] == ["letter"]


def test_a_directory_of_another_name_or_a_link_or_half_a_note_is_left_alone(
    tmp_path: Path, sockets: Path
) -> None:
    other = sockets.rename(tmp_path / "mine")
    link = tmp_path / "agentweave-x2"
    link.symlink_to(other)
    for noted in (f"17\n{other}\n", f"17\n{link}\n", f"17\n{link}", "17\n", "", "17\nagentweave-\n"):
        _clear_after(noted, tmp_path)
    assert (other / "one.sock").is_socket()


def test_clients_files_of_the_user_stay(tmp_path: Path) -> None:
    folder = tmp_path / "clients"
    folder.mkdir()
    (folder / "mine.yaml").write_text("agent: {}\n")
    (folder / "cli.yaml").write_text("# Written by `agentweave up` (process 7); ...\n")
    _clear_after("", tmp_path)
    assert [path.name for path in folder.iterdir()] == ["mine.yaml"]


def test_a_directory_with_work_of_the_user_gets_no_gitignore(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("")
    keep_out_of_git(tmp_path)
    assert not (tmp_path / ".gitignore").exists()
    (tmp_path / "main.py").rename(tmp_path / "lock")
    (tmp_path / "authorities").mkdir()
    keep_out_of_git(tmp_path)
    assert (tmp_path / ".gitignore").exists()


def test_workers_are_noted_behind_the_sockets_and_replaced_there(tmp_path: Path, sockets: Path) -> None:
    with locked(tmp_path) as lock:
        lock.note_sockets(sockets)
        before = (tmp_path / "lock").read_text()
        workers = {"hello": 4711}
        lock.workers = lambda: workers
        lock.note_workers()
        assert (tmp_path / "lock").read_text() == f"{before}hello 4711\n"
        workers["hello"] = 12
        lock.note_workers()
        assert (tmp_path / "lock").read_text() == f"{before}hello 12\n"


def test_a_full_disk_is_told_and_ends_no_worker(caplog: pytest.LogCaptureFixture) -> None:
    with open("/dev/full", "r+b", buffering=0) as full:  # noqa: PTH123 - a device, which takes nothing

        class Full:
            truncate, flush = (lambda *_: None), (lambda *_: None)

            @staticmethod
            def write(text: str) -> None:
                full.write(text.encode())

        lock = StateLock(Full())
        lock.workers = lambda: {"hello": 4711}
        lock.note_workers()
    assert "No space left on device" in caplog.text
