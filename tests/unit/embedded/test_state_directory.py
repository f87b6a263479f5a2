"""What `agentweave up` removes after a killed predecessor, and what it never touches."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from agentweave_bus.embedded.assembly import _clear_after, _keep_out_of_git


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
    _keep_out_of_git(tmp_path)
    assert not (tmp_path / ".gitignore").exists()
    (tmp_path / "main.py").rename(tmp_path / "lock")
    (tmp_path / "authorities").mkdir()
    _keep_out_of_git(tmp_path)
    assert (tmp_path / ".gitignore").exists()
