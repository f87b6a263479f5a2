"""Files that are read while a process runs: nothing may be put in their place that its reader waits for."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from agentweave_bus.authz.policy_data import read_bytes
from agentweave_bus.config.document import read_document
from agentweave_bus.exceptions import ConfigurationError, PolicyLoadError
from agentweave_bus.identity.revocation_file import load_revocations
from agentweave_bus.regular_files import open_regular


def test_a_file_and_a_link_to_one_are_read(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_bytes(b"text")
    link.symlink_to(file)
    for path in (file, link):
        with open_regular(path) as opened:
            assert opened.read() == b"text"


@pytest.mark.parametrize(
    ("read", "refusal"),
    [
        (open_regular, OSError),
        (read_bytes, PolicyLoadError),
        (read_document, ConfigurationError),
        (load_revocations, ConfigurationError),
    ],
)
def test_a_pipe_is_refused_at_once_and_nothing_stays_open(tmp_path, read, refusal) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(refusal, match="it is no regular file"):
        read(pipe)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_directories_devices_and_sockets_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path in (tmp_path, Path("/dev/zero"), tmp_path / "socket"):
            with pytest.raises(OSError, match=r"directory|no regular file|No such device"):
                open_regular(path)
