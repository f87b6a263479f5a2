"""Everything that is measured, started: brokers, policy server, and a worker and a client for each row.

All rows of this project and the raw one share one broker with mutual TLS; FastStream has a plain one of the
same program. Workers and clients are started once and wait, idle, while another row has its turn.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from agentweave_bus.embedded.nats_server import NatsServer
from agentweave_bus.embedded.stack import EmbeddedStack, StackSettings, embedded_stack
from agentweave_bus.identity import IdentitySource, SPIFFEIdentityProvider
from agentweave_bus.spiffe_id import SpiffeID
from benchmarks.child import PROFILE
from benchmarks.opa_server import opa_server
from benchmarks.places import PAYLOAD_BYTES, Place
from benchmarks.processes import ClientProcess, client_process, worker_process
from benchmarks.rows import Row

__all__ = ["CLIENT", "DOMAIN", "RAW", "Contender", "World", "svid_files", "write_grants"]

DOMAIN: Final = "bench.test"
CLIENT: Final = SpiffeID.of(DOMAIN, "client", "bench")
_SVID_S: Final = 10.0
_OPA_TIMEOUT_MS: Final = 5000
RAW: Final = {part: SpiffeID.of(DOMAIN, "raw", part) for part in ("worker", "client")}


@dataclass(frozen=True, slots=True)
class Contender:
    """A row that runs: its client waits for loads, ``processes`` serve it (``worker`` is one of them)."""

    row: Row
    client: ClientProcess
    processes: Mapping[str, int]


def agent_of(row: Row) -> SpiffeID:
    """Return the identity of the worker of one of this project's rows."""
    return SpiffeID.of(DOMAIN, "agent", f"echo-{row.name}")


def write_grants(path: Path, callees: Iterable[SpiffeID]) -> None:
    """Write who may do what: all alike, but that ``limited`` has a limit, which makes the policy read it."""
    who = {"caller": str(CLIENT), "callee": [str(one) for one in callees]}
    limit = {"max_size": 64 * PAYLOAD_BYTES}
    entries = [
        {**who, "capabilities": ["echo", "claimed"]},
        {**who, "capabilities": ["limited"], "limits": limit},
    ]
    path.write_text(yaml.safe_dump({"grants": entries}))


async def svid_files(stack: EmbeddedStack, folder: Path) -> dict[str, str]:
    """Write the SVIDs of the raw row's processes, which know no Workload API, and say where they are."""
    files = {}
    for part, me in RAW.items():
        source = IdentitySource(SPIFFEIdentityProvider(stack.api.endpoint(me), me), expected_id=me)
        await source.start(_SVID_S)
        snapshot = source.current
        await source.aclose()
        for name, content in (
            (f"{part}_certificate", snapshot.svid.chain_pem()),
            (f"{part}_key", snapshot.svid.key_pem()),
            ("authorities", b"".join(one.to_pem() for one in snapshot.bundles.values())),
        ):
            path = folder / f"{name}.pem"
            path.touch(mode=0o600)
            path.write_bytes(content)
            files[name] = str(path)
    return files


class World:
    """Starts what rows need, as they need it, inside a folder that is removed by whoever made it.

    With ``profiles``, a folder, workers and clients write a profile there when they end.
    """

    def __init__(self, folder: Path, rows: Iterable[Row], profiles: Path | None = None) -> None:
        self._folder = folder
        self._rows = tuple(rows)
        self._profiles = profiles
        self._grants = folder / "grants.yaml"
        self._pids: dict[str, int] = {}

    @asynccontextmanager
    async def contenders(self) -> AsyncIterator[tuple[Contender, ...]]:
        """Run them for the length of the block."""
        ours = [agent_of(row) for row in self._rows if row.peer == "bus"]
        write_grants(self._grants, ours or [SpiffeID.of(DOMAIN, "agent", "none")])
        settings = StackSettings(
            DOMAIN,
            self._folder / "stack",
            (*ours, CLIENT),
            self._grants,
            unrestricted=tuple(RAW.values()),
        )
        async with AsyncExitStack() as resources:
            stack = await resources.enter_async_context(embedded_stack(settings))
            yield tuple([await self._contender(row, stack, resources) for row in self._rows])

    async def _contender(self, row: Row, stack: EmbeddedStack, resources: AsyncExitStack) -> Contender:
        place, processes = await self._place(row, stack, resources)
        environment = _environments(row, stack)
        worker = await resources.enter_async_context(
            worker_process(place, self._log(row, "worker"), environment[0] | self._profiled(row, "worker"))
        )
        client = await resources.enter_async_context(
            client_process(place, self._log(row, "client"), environment[1] | self._profiled(row, "client"))
        )
        return Contender(row, client, {"worker": worker, **processes})

    async def _place(
        self, row: Row, stack: EmbeddedStack, resources: AsyncExitStack
    ) -> tuple[Place, dict[str, int]]:
        """Say where the row's worker will be, having started what it needs beside it."""
        if row.peer == "a2a":
            return Place(row.name, row.peer, f"http://127.0.0.1:{_free_port()}"), {}
        if row.peer == "faststream":
            server = NatsServer("", self._folder / row.name)
            await resources.enter_async_context(server)
            options = {"quiet": "yes" if row.quiet else ""}
            return Place(row.name, row.peer, server.url, options), _running(broker=server.pid)
        broker = _running(broker=stack.nats.pid)
        if row.peer in ("raw", "floor"):
            return Place(row.name, row.peer, stack.bus_url, await svid_files(stack, self._folder)), broker
        authorization: dict[str, object] = {"bundle": str(self._grants)}
        if row.opa:
            url, pid = await resources.enter_async_context(opa_server(stack.api.directory, self._grants))
            # With 256 in flight a decision waits for its turn for longer than the default, 50 ms.
            authorization = {"provider": "opa", "opa_endpoint": url, "timeout_ms": _OPA_TIMEOUT_MS}
            broker["opa"] = pid
        return Place(row.name, row.peer, stack.bus_url, self._configured(row, authorization)), broker

    def _configured(self, row: Row, authorization: Mapping[str, object]) -> dict[str, str]:
        """Write the configurations of one of this project's rows: the defaults, where there are any."""
        me = agent_of(row)
        agents = {
            "worker": {"name": f"echo-{row.name}", "trust_domain": DOMAIN},
            "client": {"name": "bench", "trust_domain": DOMAIN, "path": "client/bench"},
        }
        files = {}
        for part, agent in agents.items():
            path = self._folder / f"{row.name}-{part}.yaml"
            audit = {"destination": str(self._folder / "audit" / f"{row.name}-{part}.jsonl")}
            document = {
                "agent": agent,
                "authorization": {**authorization, "audit": audit},
                "observability": {"metrics": {"port": 0}},
            }
            path.write_text(yaml.safe_dump(document))
            files[f"{part}_config"] = str(path)
        return {**files, "target": str(me), "capability": row.capability}

    def _log(self, row: Row, part: str) -> Path:
        return self._folder / f"{row.name}-{part}.log"

    def _profiled(self, row: Row, part: str) -> dict[str, str]:
        return {} if self._profiles is None else {PROFILE: str(self._profiles / f"{row.name}-{part}.txt")}


def _environments(row: Row, stack: EmbeddedStack) -> tuple[dict[str, str], dict[str, str]]:
    """Return what worker and client are told in their environment."""
    if row.peer != "bus":
        return {}, {}
    return dict(stack.environment(agent_of(row))), dict(stack.environment(CLIENT))


def _running(**pids: int | None) -> dict[str, int]:
    return {name: pid for name, pid in pids.items() if pid is not None}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
