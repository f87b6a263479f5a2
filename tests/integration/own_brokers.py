"""A deployment in pieces: identities, brokers that are somebody's own, and our commands as processes.

Nothing here is the embedded stack: brokers run with a configuration from outside, the control role is
``agentweave control``, workers are ``agentweave serve``.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from agentweave_bus.cli import main
from agentweave_bus.control.broker import broker_id
from agentweave_bus.embedded.workload_api import WorkloadApiServer
from agentweave_bus.envelope import control_role
from agentweave_bus.identity import Authority, X509Svid
from agentweave_bus.runtime import READY_FD
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.supervisor.lifeline import dies_with_this_process

ROOT = Path(__file__).parents[2]
_READY_S = 60.0
_MAIN = "import sys; from agentweave_bus.cli import main; sys.exit(main())"


class Process:
    """One of our commands, in a process of its own, with a log file."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, said: str) -> None:
        self.process = process
        self.log = log
        self.said = said
        """What it wrote when it was ready; empty if it ended instead."""

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to end, and return its exit code."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(_READY_S):
            return await self.process.wait()


class Deployment:
    """Identities of a trust domain, files of configuration, and processes that end with it."""

    def __init__(self, folder: Path, domain: str, authority: Authority, api: WorkloadApiServer) -> None:
        self.folder = folder
        self.domain = domain
        self.authority = authority
        self.api = api
        self.servers = ["tls://127.0.0.1:4222"]
        self._processes: list[Process] = []

    @property
    def grants(self) -> Path:
        return self.folder / "grants.yaml"

    def grant(self, *grants: dict[str, Any]) -> None:
        draft = self.folder / "grants.new"
        draft.write_text(yaml.safe_dump({"grants": list(grants)}))
        draft.replace(self.grants)

    def server(
        self, kind: str, name: str, *, routes: Mapping[str, int] | None = None, shows: SpiffeID | None = None
    ) -> str:
        """Return ``nats/<kind>.conf`` for a server of this machine; its certificate and users lie in its folder.

        ``routes`` are the ports on which the servers of a cluster, by their names, take each other's connections.
        It is a broker, unless it ``shows`` another identity.
        """
        place = self.folder / name
        place.mkdir(mode=0o700, exist_ok=True)
        svid = _broker_svid(self.authority, shows or broker_id(self.domain))
        (place / "svid.pem").write_bytes(svid.chain_pem())
        (place / "key.pem").write_bytes(svid.key_pem())
        (place / "bundle.pem").write_bytes(self.authority.bundle.to_pem())
        text = (ROOT / "nats" / f"{kind}.conf").read_text()
        for written, here in {
            '"svid/': f'"{place}/',
            '"/var/lib/nats"': f'"{place}/streams"',
            'http: "127.0.0.1:8222"': "",
            "sync_interval: always": 'sync_interval: "1s"',
            "spiffe://shop.example/": f"spiffe://{self.domain}/",
        }.items():
            text = text.replace(written, here)
        for server, port in (routes or {}).items():
            text = text.replace(f"tls://{server}:6222", f"tls://localhost:{port}")
            if server == name:
                text = text.replace("0.0.0.0:6222", f"127.0.0.1:{port}")
        return f"NATS_NAME: {name}\n{text}" if routes else text

    def make_users(self, *names: str) -> None:
        """Write the users of servers, as an operator does, from the control role's file."""
        control = self.control_file("for-the-users")
        for name in names:
            code = main(["authz", "broker", str(control), "--write", str(self.folder / name / "users.conf")])
            assert code == 0

    def participant(self, identity: SpiffeID, **sections: Any) -> Path:
        """Write the configuration of an agent or client; return its file."""
        name = identity.path.rpartition("/")[2]
        tree = {
            "agent": {"name": name, "trust_domain": self.domain, "path": identity.path[1:]},
            "identity": self._identity(identity, name),
            "bus": {"servers": self.servers},
            "authorization": {
                "bundle": str(self.grants),
                "audit": {"destination": str(self.folder / "audit" / f"{name}.jsonl")},
            },
            "observability": _QUIET,
        }
        for section, keys in sections.items():
            tree.setdefault(section, {}).update(keys)
        return self._written(name, tree)

    def control_file(self, name: str = "control", **keys: Any) -> Path:
        """Write the configuration of a control role; return its file."""
        tree = {
            "trust_domain": self.domain,
            "grants": str(self.grants),
            "state_dir": str(self.folder / name),
            "identity": self._identity(control_role(self.domain), name),
            "bus": {"servers": self.servers},
            "observability": _QUIET,
        }
        return self._written(name, tree | keys)

    def _identity(self, identity: SpiffeID, name: str) -> dict[str, str]:
        history = self.folder / f"authorities-{name}"
        return {"spiffe_endpoint": self.api.endpoint(identity), "authority_history": str(history)}

    def _written(self, name: str, tree: dict[str, Any]) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    async def start(self, *words: str | Path) -> Process:
        """Run ``agentweave`` with ``words``; return when it is ready or has ended."""
        log = self.folder / f"process-{len(self._processes)}.log"
        reading, writing = os.pipe()
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *dies_with_this_process([sys.executable, "-c", _MAIN, *map(str, words)]),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "AGENTWEAVE_ENV": "production",
                    READY_FD: str(writing),
                },
                pass_fds=[writing],
            )
        os.close(writing)
        started = Process(process, log, "")
        self._processes.append(started)
        try:
            async with asyncio.timeout(_READY_S):
                said = await anyio.to_thread.run_sync(os.read, reading, 200, abandon_on_cancel=True)
        finally:
            os.close(reading)
        started.said = said.decode()
        return started

    async def close(self) -> None:
        for one in self._processes:
            if one.process.returncode is None:
                one.process.kill()
            await one.process.wait()


def _broker_svid(authority: Authority, identity: SpiffeID) -> X509Svid:
    """Issue a broker's SVID with the names of this machine, by which servers of a cluster verify each other."""
    issued = authority.issue(identity, lifetime=timedelta(hours=12))
    old = issued.leaf
    builder = x509.CertificateBuilder(
        old.issuer,
        old.subject,
        old.public_key(),
        old.serial_number,
        old.not_valid_before_utc,
        old.not_valid_after_utc,
    )
    for extension in old.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            here = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            value = x509.SubjectAlternativeName([*extension.value, *here])
            builder = builder.add_extension(value, extension.critical)
        else:
            builder = builder.add_extension(extension.value, extension.critical)
    leaf = builder.sign(authority._signer.key, hashes.SHA256()).public_bytes(Encoding.DER)
    key = load_pem_private_key(issued.key_pem(), None)
    return X509Svid.from_der([leaf, *(one.public_bytes(Encoding.DER) for one in authority._chain)], key)


_QUIET = {"metrics": {"enabled": False}, "logging": {"level": "INFO", "format": "text"}}


@asynccontextmanager
async def deployment(folder: Path, domain: str, *identities: SpiffeID) -> AsyncIterator[Deployment]:
    """Bring up the authority and the Workload API of ``identities`` and the control role."""
    async with AsyncExitStack() as stack:
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="own-")))
        authority = await asyncio.to_thread(Authority.load_or_create, folder / "authority", domain)
        api = WorkloadApiServer(authority, sockets, lifetime=timedelta(hours=12))
        await stack.enter_async_context(api)
        for identity in (control_role(domain), *identities):
            await api.serve(identity)
        made = Deployment(folder, domain, authority, api)
        stack.push_async_callback(made.close)
        yield made


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody listens on at the moment."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in probes]
