"""Waiting for an OPA server on a unix socket: the socket is there before anybody listens on it."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path

__all__ = ["wait_until_healthy"]


def wait_until_healthy(path: Path, process: subprocess.Popen[bytes], seconds: float = 30) -> None:
    """Return when the server answers; fail if it ends before that, or takes longer than ``seconds``."""
    deadline = time.monotonic() + seconds
    while not _says_healthy(path):
        assert process.poll() is None, "opa ended"
        assert time.monotonic() < deadline, "opa did not start"
        time.sleep(0.01)


def _says_healthy(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        try:
            connection.connect(str(path))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: opa\r\nConnection: close\r\n\r\n")
            return b" 200 " in connection.recv(64)
        except OSError:
            return False
