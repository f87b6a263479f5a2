"""A real SPIRE server and agent, and a broker whose certificate is SPIRE's, in place of the embedded stack."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import yaml

from agentweave_bus.authz import Grants
from agentweave_bus.bus.claims import NEW_STREAM_S
from agentweave_bus.bus.connection import BusAddress, Keeper
from agentweave_bus.bus.streams import claim_stream
from agentweave_bus.control.broker import BrokerFiles, broker_configuration, broker_id, broker_users
from agentweave_bus.control.reconcile import reconcile_streams
from agentweave_bus.embedded.nats_server import NatsServer, tools_directory
from agentweave_bus.envelope import control_role
from agentweave_bus.identity import ChainVerifier, IdentitySource, SPIFFEIdentityProvider, X509Bundle
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.probes import DOMAIN, PATIENCE, Held
from tests.integration.world import World

BROKER: Final = broker_id(DOMAIN)
CONTROL: Final = control_role(DOMAIN)
NODE: Final = f"spiffe://{DOMAIN}/node"
"""The parent of every entry: whatever agent was let in with a token for it."""
TTL_S: Final = 20
"""The lifetime of every workload's SVID. SPIRE backdates it by 10 s and renews at half, so after about 5 s."""


def missing_programs() -> str:
    """What to say when SPIRE is not there; empty when it is."""
    names = [
        name for name in ("spire-server", "spire-agent") if not os.access(tools_directory() / name, os.X_OK)
    ]
    return f"no {' and '.join(names)}: 'make tools-spire' builds them (7 minutes)" if names else ""


class Spire:
    """A SPIRE server and agent of one trust domain, as child processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.endpoint = f"unix://{folder}/agent.sock"
        self._admin = folder / "server.sock"
        self._server: asyncio.subprocess.Process | None = None
        self._agent: asyncio.subprocess.Process | None = None
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]

    async def start_server(self) -> None:
        config = self.folder / "server.conf"
        config.write_text(_SERVER.format(folder=self.folder, port=self._port, domain=DOMAIN))
        self._server = await self._spawn("spire-server", config)
        await self._healthy("spire-server", self._admin, self._server)

    async def start_agent(self) -> None:
        """Let an agent in with a new token. It keeps nothing, so each start is the first one."""
        said = await self.ask("token", "generate", "-spiffeID", NODE, "-output", "json")
        token = json.loads(said)["value"]
        (self.folder / "bundle.pem").write_text(await self.ask("bundle", "show"))
        shutil.rmtree(self.folder / "agent", ignore_errors=True)
        config = self.folder / "agent.conf"
        config.write_text(_AGENT.format(folder=self.folder, port=self._port, domain=DOMAIN, token=token))
        self._agent = await self._spawn("spire-agent", config)
        await self._healthy("spire-agent", self.folder / "agent.sock", self._agent)

    async def kill_agent(self) -> None:
        await _kill(self._agent)
        (self.folder / "agent.sock").unlink(missing_ok=True)

    async def aclose(self) -> None:
        await _kill(self._agent)
        await _kill(self._server)

    async def register(
        self, identities: Iterable[SpiffeID], *, uid: int, federates_with: Iterable[str] = ()
    ) -> None:
        """Say that processes of ``uid`` are each of ``identities``."""
        entries = [
            {
                "spiffe_id": str(identity),
                "parent_id": NODE,
                "selectors": [{"type": "unix", "value": f"uid:{uid}"}],
                "x509_svid_ttl": TTL_S,
                "federates_with": [f"spiffe://{domain}" for domain in federates_with],
            }
            for identity in identities
        ]
        file = self.folder / "entries.json"
        file.write_text(json.dumps({"entries": entries}))
        await self.ask("entry", "create", "-data", str(file))

    async def remove(self, identity: SpiffeID) -> None:
        """Take away every entry of an identity."""
        shown = json.loads(await self.ask("entry", "show", "-spiffeID", str(identity), "-output", "json"))
        for entry in shown["entries"]:
            await self.ask("entry", "delete", "-entryID", entry["id"])

    async def federate(self, bundle: X509Bundle) -> None:
        """Have the server know the bundle of another trust domain."""
        file = self.folder / "federated.pem"
        file.write_bytes(bundle.to_pem())
        await self.ask("bundle", "set", "-id", f"spiffe://{bundle.trust_domain}", "-path", str(file))

    async def authority(self, verb: str, identifier: str = "") -> str:
        """``prepare``, ``activate``, ``taint`` or ``revoke`` an authority; return its identifier."""
        named = ["-authorityID", identifier] if identifier else []
        said = json.loads(await self.ask("localauthority", "x509", verb, *named, "-output", "json"))
        return str(next(iter(said.values()))["authority_id"])

    async def active_authority(self) -> str:
        """The identifier of the authority that signs now."""
        said = json.loads(await self.ask("localauthority", "x509", "show", "-output", "json"))
        return str(said["active"]["authority_id"])

    async def ask(self, *words: str) -> str:
        """Ask the server something on its administrators' socket."""
        command = [str(tools_directory() / "spire-server"), *words, "-socketPath", str(self._admin)]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
        async with asyncio.timeout(PATIENCE):
            out, errors = await process.communicate()
        assert process.returncode == 0, (words, out, errors)
        return out.decode()

    async def _spawn(self, name: str, config: Path) -> asyncio.subprocess.Process:
        with (self.folder / f"{name}.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                str(tools_directory() / name), "run", "-config", str(config), stdout=log, stderr=log
            )

    async def _healthy(self, name: str, path: Path, process: asyncio.subprocess.Process) -> None:
        give_up = time.monotonic() + 2 * PATIENCE
        command = [str(tools_directory() / name), "healthcheck", "-socketPath", str(path)]
        quiet = asyncio.subprocess.DEVNULL
        while True:
            check = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
            if await check.wait() == 0:
                return
            log = (self.folder / f"{name}.log").read_text()[-2000:]
            assert process.returncode is None, f"{name} ended: {log}"
            assert time.monotonic() < give_up, f"{name} is not well: {log}"
            await asyncio.sleep(0.1)


async def _kill(process: asyncio.subprocess.Process | None) -> None:
    if process is not None and process.returncode is None:
        process.kill()
        await process.wait()


_SERVER: Final = """
server {{
    bind_address = "127.0.0.1"
    bind_port = "{port}"
    socket_path = "{folder}/server.sock"
    trust_domain = "{domain}"
    data_dir = "{folder}/server"
    log_level = "INFO"
}}
plugins {{
    DataStore "sql" {{
        plugin_data {{
            database_type = "sqlite3"
            connection_string = "{folder}/server/datastore.sqlite3"
        }}
    }}
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    KeyManager "memory" {{ plugin_data {{}} }}
}}
"""

_AGENT: Final = """
agent {{
    server_address = "127.0.0.1"
    server_port = "{port}"
    socket_path = "{folder}/agent.sock"
    trust_domain = "{domain}"
    trust_bundle_path = "{folder}/bundle.pem"
    join_token = "{token}"
    data_dir = "{folder}/agent"
    log_level = "INFO"
    experimental {{ sync_interval = "1s" }}
}}
plugins {{
    NodeAttestor "join_token" {{ plugin_data {{}} }}
    KeyManager "memory" {{ plugin_data {{}} }}
    WorkloadAttestor "unix" {{ plugin_data {{}} }}
}}
"""


# --- a broker with SPIRE's certificate ------------------------------------------------------------------


class SpireStack:
    """What ``World`` needs of a stack, with SPIRE as the authority and its agent as the Workload API."""

    broker_id = BROKER

    def __init__(self, spire: Spire, nats: NatsServer, broker: IdentitySource) -> None:
        self.spire = spire
        self.nats = nats
        self.broker = broker
        self.api = SimpleNamespace(endpoint=lambda _identity: spire.endpoint)

    @property
    def bus_url(self) -> str:
        return f"tls://127.0.0.1:{self.nats.port}"


@asynccontextmanager
async def spire_world(folder: Path, identities: tuple[SpiffeID, ...], grants: Any) -> AsyncIterator[World]:
    """Everything started; ``identities`` are this uid's. ``folder`` has a short path (it holds sockets)."""
    spire = Spire(folder)
    try:
        await spire.start_server()
        await spire.register([*identities, BROKER, CONTROL], uid=os.getuid())
        await spire.start_agent()
        async with _stack(spire, identities, grants) as stack:
            world = World(folder, stack)  # type: ignore[arg-type]
            try:
                yield world
            finally:
                await world.clear()
    finally:
        await spire.aclose()


@asynccontextmanager
async def _stack(spire: Spire, identities: tuple[SpiffeID, ...], grants: Any) -> AsyncIterator[SpireStack]:
    (spire.folder / "grants.yaml").write_text(yaml.safe_dump(grants))
    users = broker_users(Grants.load(spire.folder / "grants.yaml"), identities, control=[CONTROL])
    place = spire.folder / "broker"
    place.mkdir(mode=0o700)
    files = BrokerFiles(place / "svid.pem", place / "key.pem", place / "authorities.pem", place / "streams")
    async with _source(spire, BROKER) as source, _source(spire, CONTROL) as control:
        _write(files, source)
        nats = NatsServer(broker_configuration("agentweave", files, users), place)
        async with nats, asyncio.TaskGroup() as group:
            stack = SpireStack(spire, nats, source)
            following = group.create_task(_follow(nats, files, source))
            await _make_streams(stack, control, identities)
            try:
                yield stack
            finally:
                following.cancel()


@asynccontextmanager
async def _source(spire: Spire, identity: SpiffeID) -> AsyncIterator[IdentitySource]:
    source = IdentitySource(SPIFFEIdentityProvider(spire.endpoint, identity), expected_id=identity)
    await source.start(PATIENCE)
    try:
        yield source
    finally:
        await source.aclose()


async def _follow(nats: NatsServer, files: BrokerFiles, source: IdentitySource) -> None:
    """Give the broker each new certificate."""
    renewed = asyncio.Event()
    source.subscribe(lambda _snapshot: renewed.set())
    async with asyncio.TaskGroup() as group:
        group.create_task(source.run())
        while True:
            await renewed.wait()
            renewed.clear()
            _write(files, source)
            await nats.reload()


async def _make_streams(stack: SpireStack, control: IdentitySource, identities: Iterable[SpiffeID]) -> None:
    keeper = Keeper(
        control, ChainVerifier(control), BusAddress([stack.bus_url], stack.broker_id), name="control"
    )
    async with keeper.open(deadline_s=PATIENCE):
        session = await keeper.session(PATIENCE)
        await reconcile_streams(session, (claim_stream(one) for one in identities))
    await asyncio.sleep(NEW_STREAM_S + 0.1)  # nothing can be claimed earlier


def _write(files: BrokerFiles, source: IdentitySource) -> None:
    snapshot = source.current
    for path, content in (
        (files.certificate, snapshot.svid.chain_pem()),
        (files.key, snapshot.svid.key_pem()),
        (files.authorities, snapshot.bundles[DOMAIN].to_pem()),
    ):
        path.touch(mode=0o600)
        path.write_bytes(content)


async def held_spire_world(folder: Path, identities: tuple[SpiffeID, ...], grants: Any) -> Held[World]:
    """Hold it open in a task of its own, as fixtures need."""
    return await Held.open(spire_world(folder, identities, grants))
