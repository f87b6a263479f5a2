"""Files that are read while a process runs: nothing may be put in their place that its reader waits for."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentweave_bus.authz.policy_data import read_bytes
from agentweave_bus.config.document import read_document
from agentweave_bus.exceptions import (
    BundleUnavailableError,
    ConfigurationError,
    PolicyLoadError,
    SvidUnavailableError,
)
from agentweave_bus.identity import Authority, SpiffeID, StaticMTLSProvider
from agentweave_bus.identity.revocation_file import load_revocations
from agentweave_bus.regular_files import open_regular
from agentweave_bus.secrets import FileSecrets


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


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A pipe that nobody writes to; a reader that waits for it is sent away after a second."""
    path = tmp_path / "pipe"
    os.mkfifo(path, 0o600)
    end = threading.Timer(1, lambda: os.close(os.open(path, os.O_WRONLY)))
    end.start()
    yield path
    end.cancel()


@pytest.mark.anyio
async def test_a_secret_that_is_a_pipe_is_refused(pipe: Path) -> None:
    with pytest.raises(ConfigurationError, match="it is no regular file"):
        await FileSecrets(pipe.parent).get_secret(pipe.name)


def identity_in(folder: Path, *, with_pipe: Path, as_file: str) -> StaticMTLSProvider:
    authority = Authority("a.test")
    svid = authority.issue(SpiffeID("spiffe://a.test/agent/x"))
    texts = {"chain": svid.chain_pem(), "key": svid.key_pem(), "bundle": authority.bundle.to_pem()}
    for name, text in texts.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(text)
    (folder / as_file).unlink()
    (folder / as_file).hardlink_to(with_pipe)
    return StaticMTLSProvider(folder / "chain", folder / "key", {"a.test": folder / "bundle"})


@pytest.mark.anyio
@pytest.mark.parametrize("which", ["chain", "key", "bundle"])
async def test_an_identitys_file_that_is_a_pipe_is_refused(pipe: Path, which: str) -> None:
    provider = identity_in(pipe.parent, with_pipe=pipe, as_file=which)
    with pytest.raises((SvidUnavailableError, BundleUnavailableError), match="it is no regular file"):
        await (provider.get_trust_bundle("a.test") if which == "bundle" else provider.get_svid())
