"""What `agentweave up` removes after a killed predecessor, and what it never touches."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from agentweave_bus.embedded.state_directory import StateLock, _clear_after, keep_out_of_git, locked
from agentweave_bus.exceptions import ConfigurationError

STRANGER = 65_534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


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


@as_root
@pytest.mark.parametrize("mode", [0o700, 0o777, 0o1777])
def test_the_directory_of_another_user_is_refused_and_left_as_it_is(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    os.chown(tmp_path, STRANGER, STRANGER)
    said = f"{tmp_path} belongs to user {STRANGER}, but this process runs as user 0: .*--state-dir"
    with pytest.raises(ConfigurationError, match=said) as caught, locked(tmp_path):
        pass
    assert caught.value.key == "state_dir"
    assert list(tmp_path.iterdir()) == []
    assert mode_of(tmp_path) == mode


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_directory_with_other_things_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "main.py").write_text("")
    tmp_path.chmod(mode)
    said = rf"Other users may write {tmp_path} \(mode {mode:o}\): .*chmod go-w {tmp_path}"
    with pytest.raises(ConfigurationError, match=said), locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["main.py"]
    assert mode_of(tmp_path) == mode
    tmp_path.chmod(mode & ~0o022)
    with locked(tmp_path):
        assert (tmp_path / "lock").exists()


def test_one_that_is_for_everybody_is_not_closed_even_when_empty(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with pytest.raises(ConfigurationError, match=r"mode 1777"), locked(tmp_path):
        pass
    assert mode_of(tmp_path) == 0o1777


@pytest.mark.parametrize("entries", [[], ["audit", "authorities"], [".gitignore", "audit", "lock"]])
@pytest.mark.parametrize(("mode", "then"), [(0o775, 0o755), (0o777, 0o755), (0o770, 0o750)])
def test_one_that_was_made_under_a_loose_umask_is_closed_and_used(
    tmp_path: Path, entries: list[str], mode: int, then: int
) -> None:
    for name in entries:
        (tmp_path / name).touch()
    tmp_path.chmod(mode)
    with locked(tmp_path):
        assert mode_of(tmp_path) == then


@as_root
def test_what_another_user_put_into_one_that_was_open_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "authority").mkdir()
    os.chown(tmp_path / "authority", STRANGER, STRANGER)
    tmp_path.chmod(0o775)
    with pytest.raises(ConfigurationError, match=r"Other users may write"), locked(tmp_path):
        pass


def test_what_is_put_there_just_before_it_is_closed_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o775)
    close = os.fchmod

    def late(descriptor: int, mode: int) -> None:  # no other way to come between the look and the closing
        (tmp_path / "planted").touch()
        close(descriptor, mode)

    monkeypatch.setattr(os, "fchmod", late)
    with pytest.raises(ConfigurationError, match=r"Other users may write"), locked(tmp_path):
        pass


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_what_it_makes_itself_is_its_users_alone_under_any_umask(tmp_path: Path, umask: int) -> None:
    state = tmp_path / "deep" / "state"
    before = os.umask(umask)
    try:
        for _again in range(2):
            with locked(state):
                assert mode_of(state) == 0o700
    finally:
        os.umask(before)


def test_a_link_to_a_directory_of_ones_own_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o700)
    (tmp_path / "here").symlink_to(tmp_path / "there")
    with locked(tmp_path / "here"):
        assert (tmp_path / "there" / "lock").exists()
