"""A real ``opa run --server`` for tests over a live world: it polls its bundle, as it would in production."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anyio.to_thread
import yaml

from agentweave_bus.authz.policy_bundle import build_bundle
from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.identity import X509Bundle, X509Svid
from tests.integration.probes import PATIENCE


class BundleService:
    """Serves one bundle over HTTP, with the tag of its content, as a bundle service does."""

    def __init__(self, bundle: Path) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = bundle.read_bytes()
                tag = f'"{hashlib.sha256(content).hexdigest()}"'
                fresh = self.headers.get("If-None-Match") != tag
                self.send_response(200 if fresh else 304)
                self.send_header("ETag", tag)
                self.send_header("Content-Length", str(len(content) if fresh else 0))
                self.end_headers()
                self.wfile.write(content if fresh else b"")

            def log_message(self, *_words: Any) -> None:
                """Be quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="bundle service")
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class OpaServer:
    """One server: on a unix socket, or with ``svid`` over HTTPS with client certificates required.

    ``folder`` has a short path (it holds the socket) and only its owner can write it.
    """

    def __init__(
        self, folder: Path, *, svid: X509Svid | None = None, clients: X509Bundle | None = None
    ) -> None:
        self.folder = folder
        self.socket = folder / "opa.sock"
        self._health = folder / "health.sock"
        self.bundle = folder / "bundle.tar.gz"
        self._policies = folder / "policies"
        self._policies.mkdir(parents=True)
        self._bundles: BundleService | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._port: int | None = None
        if svid is None:
            self.url, self._listen = f"unix://{self.socket}", ["--addr", f"unix://{self.socket}"]
        else:
            assert clients is not None
            self.url, self._listen = self._https(svid, clients)

    def _https(self, svid: X509Svid, clients: X509Bundle) -> tuple[str, list[str]]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = self._port = probe.getsockname()[1]
        files = {"cert": svid.chain_pem(), "key": svid.key_pem(), "clients": clients.to_pem()}
        for name, content in files.items():
            path = self.folder / f"{name}.pem"
            path.touch(mode=0o600)
            path.write_bytes(content)
        listen = ["--addr", f"127.0.0.1:{port}", "--authentication", "tls", "--min-tls-version", "1.3"]
        listen += ["--tls-cert-file", str(self.folder / "cert.pem")]
        listen += ["--tls-private-key-file", str(self.folder / "key.pem")]
        listen += ["--tls-ca-cert-file", str(self.folder / "clients.pem")]
        return f"https://127.0.0.1:{port}", listen

    def publish(self, grants: dict[str, Any]) -> str:
        """Put a bundle of these grants where the server looks for it; return its revision."""
        (self._policies / "grants.yaml").write_text(yaml.safe_dump(grants))
        draft = self.folder / "bundle.new"
        draft.write_bytes(build_bundle(self._policies))
        draft.replace(self.bundle)
        with tarfile.open(self.bundle) as packed:
            manifest = packed.extractfile(".manifest")
            assert manifest is not None
            return str(json.load(manifest)["revision"])

    async def start(self, grants: dict[str, Any] | None = None) -> None:
        """Start it and wait until it has its bundle."""
        if grants is not None:
            self.publish(grants)
        self._bundles = self._bundles or BundleService(self.bundle)
        polling = {"min_delay_seconds": 1, "max_delay_seconds": 1}
        config = {
            "services": {"policies": {"url": self._bundles.url}},
            "bundles": {"agentweave": {"service": "policies", "resource": "bundle", "polling": polling}},
        }
        (self.folder / "opa.yaml").write_text(yaml.safe_dump(config))
        quiet = ["--log-level", "error", "--skip-version-check"]
        command = [str(find_opa()), "run", "--server", *self._listen, *quiet]
        command += ["--diagnostic-addr", f"unix://{self._health}", "-c", str(self.folder / "opa.yaml")]
        self._process = await asyncio.create_subprocess_exec(*command)
        await self._healthy()

    async def stop(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            await self._process.wait()
            self._process = None
            for path in (self.socket, self._health):
                path.unlink(missing_ok=True)

    async def aclose(self) -> None:
        """End it and where it gets its bundle."""
        await self.stop()
        if self._bundles is not None:
            await anyio.to_thread.run_sync(self._bundles.close)

    async def _healthy(self) -> None:
        give_up = time.monotonic() + PATIENCE
        while not (await self._says_healthy() and await self._listens()):
            assert self._process is not None
            assert self._process.returncode is None, "opa ended"
            assert time.monotonic() < give_up, "opa has no bundle"
            await asyncio.sleep(0.02)

    async def _listens(self) -> bool:
        """Tell whether it takes questions: those about its health go to a socket of their own."""
        try:
            if self._port is None:
                _, writer = await asyncio.open_unix_connection(self.socket)
            else:
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            return False
        writer.close()
        await writer.wait_closed()
        return True

    async def _says_healthy(self) -> bool:
        try:
            reader, writer = await asyncio.open_unix_connection(self._health)
        except OSError:
            return False
        try:
            writer.write(b"GET /health?bundles HTTP/1.1\r\nHost: opa\r\nConnection: close\r\n\r\n")
            return b" 200 " in await reader.readline()
        finally:
            writer.close()
            await writer.wait_closed()
