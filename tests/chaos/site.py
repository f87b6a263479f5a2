"""The place where it happens: an authority, a real nats-server with file storage, and everybody's processes.

It is the embedded stack in pieces, so that each piece can be killed by itself. Everything started here is
ended here.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from agentweave_bus.authz import Grants
from agentweave_bus.control.broker import BrokerFiles, broker_configuration, broker_id, broker_users
from agentweave_bus.embedded.nats_server import NatsServer
from agentweave_bus.embedded.workload_api import WorkloadApiServer
from agentweave_bus.envelope import control_role
from agentweave_bus.identity import Authority
from agentweave_bus.observability.heartbeat import READY_FD
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.supervisor.lifeline import dies_with_this_process
from tests.chaos.plan import AGENT, AUDITOR, CLIENT, DOMAIN, KINDS, SETTINGS, Settings
from tests.faults.proxy import Proxy, proxied

ROOT = Path(__file__).parents[2]
_READY_S = 60.0
_LIFETIME = timedelta(hours=12)


class Child:
    """A process that is killed and started again, under one name and with one log file."""

    def __init__(self, name: str, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.starts = 0
        self.expected = False
        """Whether its end is of our making."""
        self._command = command
        self._environment = environment
        self.log = log
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code; ``None`` while it runs."""
        return None if self._process is None else self._process.returncode

    async def start(self, *, ready: bool = False) -> None:
        """Start it; with ``ready`` wait for its word on the descriptor that the stock worker writes to."""
        self.starts += 1
        self.expected = False
        if not ready:
            await self._spawn({})
            return
        reading, writing = os.pipe()
        try:
            await self._spawn({READY_FD: str(writing)}, writing)
            os.close(writing)
            async with asyncio.timeout(_READY_S):
                await asyncio.to_thread(os.read, reading, 100)
        finally:
            os.close(reading)

    async def _spawn(self, environment: Mapping[str, str], *descriptors: int) -> None:
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *dies_with_this_process(self._command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **self._environment, **environment},
                pass_fds=descriptors,
                start_new_session=True,
            )

    def signal(self, number: signal.Signals) -> None:
        if self.code is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """End it at once, and reap it."""
        if self._process is None:
            return
        self.expected = True
        self.signal(signal.SIGKILL)
        await self._process.wait()

    async def wait(self) -> int:
        assert self._process is not None
        return await self._process.wait()


@dataclass(frozen=True, slots=True)
class Ground:
    """What everybody stands on: the broker, the proxy before it, and who gives out identities."""

    settings: Settings
    nats: NatsServer
    proxy: Proxy
    authority: Authority
    api: WorkloadApiServer


class Site:
    """A running site. Made by :func:`site`."""

    def __init__(self, ground: Ground, make: Callable[..., Child]) -> None:
        settings = ground.settings
        self.settings = settings
        self.nats = ground.nats
        self.proxy = ground.proxy
        self.authority = ground.authority
        self.api = ground.api
        self.control = make("control", "tests.chaos.control")
        self.submitter = make("submitter", "tests.chaos.client", "submit")
        self.watcher = make("watcher", "tests.chaos.client", "watch")
        far, near = (str(Path(settings.folder) / name) for name in ("parted.yaml", "agent.yaml"))
        files = (far, near, near, near)
        self.workers = [
            make(f"worker-{number}", "agentweave_bus.worker", file) for number, file in enumerate(files, 1)
        ]

    @property
    def parted(self) -> Child:
        """The worker behind the proxy."""
        return self.workers[0]

    @property
    def children(self) -> list[Child]:
        return [*self.workers, self.submitter, self.watcher, self.control]


@asynccontextmanager
async def site(folder: Path, **settings: Any) -> AsyncIterator[Site]:
    """Bring up authority and broker; what else there is, is made and not started yet."""
    async with AsyncExitStack() as stack:
        sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        authority = await asyncio.to_thread(Authority.load_or_create, folder / "authority", DOMAIN)
        api = await stack.enter_async_context(WorkloadApiServer(authority, sockets, lifetime=_LIFETIME))
        control = control_role(DOMAIN)
        for identity in (control, AGENT, CLIENT):
            await api.serve(identity)
        nats = NatsServer(_broker(folder, authority), folder / "broker", timeout=60)
        await stack.enter_async_context(nats)
        proxy = await stack.enter_async_context(proxied(nats.port))
        made = Settings(
            folder=str(folder),
            bus_url=f"tls://127.0.0.1:{nats.port}",
            broker_id=str(broker_id(DOMAIN)),
            control_endpoint=api.endpoint(control),
            **settings,
        )
        (folder / "settings.json").write_text(json.dumps(made.to_json()))
        agent = _participant(made, AGENT, api.endpoint(AGENT))
        agent["agent"]["class"] = "tests.chaos.agent:Chaos"
        agent["bus"]["task_ack_wait"] = float(made.ack_wait_s)
        (folder / "agent.yaml").write_text(yaml.safe_dump(agent))
        parted = {**agent, "bus": {**agent["bus"], "servers": [proxy.url]}}
        (folder / "parted.yaml").write_text(yaml.safe_dump(parted))
        made.client_file.write_text(yaml.safe_dump(_participant(made, CLIENT, api.endpoint(CLIENT))))

        def make(name: str, module: str, *arguments: str) -> Child:
            command = [sys.executable, "-m", module, *arguments]
            environment = {
                SETTINGS: str(folder / "settings.json"),
                "PYTHONPATH": str(ROOT),
                "AGENTWEAVE_ENV": "production",
            }
            return Child(name, command, environment, folder / f"{name}.log")

        running = Site(Ground(made, nats, proxy, authority, api), make)
        try:
            yield running
        finally:
            for child in running.children:
                await child.kill()


def _broker(folder: Path, authority: Authority) -> str:
    files = BrokerFiles(
        folder / "broker-svid.pem", folder / "broker-key.pem", folder / "authorities.pem", folder / "streams"
    )
    svid = authority.issue(broker_id(DOMAIN), lifetime=_LIFETIME)
    files.certificate.write_bytes(svid.chain_pem())
    files.key.write_bytes(svid.key_pem())
    files.key.chmod(0o600)
    files.authorities.write_bytes(authority.bundle.to_pem())
    (folder / "grants.yaml").write_text(yaml.safe_dump(_GRANTS))
    grants = Grants.load(folder / "grants.yaml")
    users = broker_users(grants, [AGENT, CLIENT], control=[control_role(DOMAIN)], unrestricted=[AUDITOR])
    return broker_configuration("chaos", files, users)


_GRANTS = {
    "grants": [
        {
            "caller": str(CLIENT),
            "callee": str(AGENT),
            "capabilities": ["quick", *KINDS],
            "kinds": ["task"],
        }
    ]
}


def _participant(settings: Settings, identity: SpiffeID, endpoint: str) -> dict[str, Any]:
    name = identity.path.rpartition("/")[2]
    folder = Path(settings.folder)
    return {
        "agent": {"name": name, "trust_domain": DOMAIN, "path": identity.path[1:]},
        "identity": {"spiffe_endpoint": endpoint},
        "bus": {"servers": [settings.bus_url], "server_spiffe_id": settings.broker_id},
        "authorization": {
            "bundle": str(folder / "grants.yaml"),
            "audit": {"destination": str(folder / "audit" / f"{name}.jsonl")},
        },
        "observability": {"metrics": {"enabled": False}, "logging": {"level": "INFO", "format": "text"}},
    }
