"""What the comparison of tasks needs, started: brokers, and for each row a client, and workers of each queue.

This project's row and bare JetStream have one broker with mutual TLS; each row of Taskiq has a plain one of
the same program. All store to disk. Workers and clients wait, idle, while another row has its turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import nats
import yaml
from nats.js import JetStreamContext

from agentweave_bus.bus.streams import task_consumer
from agentweave_bus.embedded.nats_server import NatsServer
from agentweave_bus.embedded.stack import EmbeddedStack, StackSettings, embedded_stack
from agentweave_bus.spiffe_id import SpiffeID
from benchmarks.child import PROFILE
from benchmarks.durable.rows import IDLE, QUEUES, TaskRow
from benchmarks.peers.raw import connected
from benchmarks.places import Place
from benchmarks.processes import ClientProcess, child_command, child_process, client_process
from benchmarks.world import CLIENT, DOMAIN, RAW, svid_files

__all__ = ["Contender", "Queue", "TaskWorld", "WorkerProcess"]

_CHILD: Final = "benchmarks.durable.child"
_CAPABILITIES: Final = ("noop", "stamped", "hang")
_LOOK_S: Final = 0.02
_PLAIN: Final = 'jetstream {{ store_dir: "{}" }}\n'


class WorkerProcess:
    """A worker that can be told to wait."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def tell(self, word: str) -> None:
        """Say ``open`` or ``close`` to its gate. It hears that a little later."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word}\n".encode())


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue of a row, its workers, and where the broker counts what waits in it."""

    name: str
    workers: Sequence[WorkerProcess]
    broker: JetStreamContext
    stream: str
    consumer: str

    async def waiting(self) -> int:
        """Return how many tasks are not acknowledged yet."""
        info = await self.broker.consumer_info(self.stream, self.consumer)
        return (info.num_pending or 0) + (info.num_ack_pending or 0)

    async def stored_bytes(self) -> int:
        """Return how much all that is stored takes on the broker's disk."""
        info = await self.broker.stream_info(self.stream)
        return int(info.state.bytes)

    async def down_to(self, count: int, limit_s: float) -> float:
        """Return when at most ``count`` are left, by the performance counter in seconds.

        Raises:
            RuntimeError: there are more after ``limit_s`` seconds.

        """
        until = time.perf_counter() + limit_s
        while (waiting := await self.waiting()) > count:
            if time.perf_counter() > until:
                raise RuntimeError(f"{waiting} tasks of {self.stream} are still there after {limit_s:g} s")
            await asyncio.sleep(_LOOK_S)
        return time.perf_counter()

    def tell(self, word: str) -> None:
        """Say ``open`` or ``close`` to the gates of all workers."""
        for worker in self.workers:
            worker.tell(word)


@dataclass(frozen=True, slots=True)
class Contender:
    """A row that runs. ``stamps`` is the file of its handlers' starting times."""

    row: TaskRow
    clients: Sequence[ClientProcess]
    queues: Mapping[str, Queue]
    broker_pid: int
    stamps: str

    @property
    def client(self) -> ClientProcess:
        """The client, or the first of them."""
        return self.clients[0]


class TaskWorld:
    """Starts what rows need inside a folder that is removed by whoever made it.

    ``queues`` says how many worker processes each has; those of ``closed`` wait from the beginning. With
    ``profiles``, a folder, workers and clients write a profile there when they end.
    """

    def __init__(
        self,
        folder: Path,
        rows: Sequence[TaskRow],
        *,
        queues: Mapping[str, int] = QUEUES,
        closed: Sequence[str] = (IDLE,),
        clients: int = 1,
        profiles: Path | None = None,
    ) -> None:
        self._folder = folder
        self._rows = rows
        self._queues = queues
        self._closed = closed
        self._clients = clients
        self._profiles = profiles
        self._grants = folder / "grants.yaml"

    @asynccontextmanager
    async def contenders(self) -> AsyncIterator[tuple[Contender, ...]]:
        """Run them for the length of the block."""
        agents = tuple(agent_of(queue) for queue in self._queues)
        who = {"caller": str(CLIENT), "callee": [str(one) for one in agents]}
        self._grants.write_text(yaml.safe_dump({"grants": [{**who, "capabilities": list(_CAPABILITIES)}]}))
        settings = StackSettings(
            DOMAIN,
            self._folder / "stack",
            (*agents, CLIENT),
            self._grants,
            unrestricted=tuple(RAW.values()),
        )
        async with AsyncExitStack() as resources:
            stack = await resources.enter_async_context(embedded_stack(settings))
            raw = Place("raw", "raw", stack.bus_url, await svid_files(stack, self._folder))
            yield tuple([await self._contender(row, stack, raw, resources) for row in self._rows])

    async def _contender(
        self, row: TaskRow, stack: EmbeddedStack, raw: Place, resources: AsyncExitStack
    ) -> Contender:
        if row.peer == "taskiq":
            store = self._folder / row.name
            server = await resources.enter_async_context(NatsServer(_PLAIN.format(store / "streams"), store))
            address, broker_pid = server.url, server.pid
            watcher = await nats.connect(address)
            resources.push_async_callback(watcher.close)
        else:
            address, broker_pid = stack.bus_url, stack.nats.pid
            watcher = await resources.enter_async_context(connected(raw, "client"))
        assert broker_pid is not None
        options = {
            "queues": ",".join(self._queues),
            "keeps": "yes" if row.keeps else "",
            **{what: str(self._folder / f"{row.name}-{what}") for what in ("starts", "cancels")},
            **(raw.options if row.peer in ("raw", "floor") else {}),
        }
        queues = {}
        for name, count in self._queues.items():
            place = Place(row.name, row.peer, address, {**options, "queue": name, "gate": self._gate(name)})
            workers = [await self._worker(place, n, stack, resources) for n in range(count)]
            queues[name] = Queue(name, workers, watcher.jetstream(), *_consumer_of(row, name))
        place = Place(row.name, row.peer, address, options)
        clients = [await self._client(place, number, stack, resources) for number in range(self._clients)]
        return Contender(row, clients, queues, broker_pid, options["starts"])

    def _gate(self, queue: str) -> str:
        return "closed" if queue in self._closed else "open"

    async def _worker(
        self, place: Place, number: int, stack: EmbeddedStack, resources: AsyncExitStack
    ) -> WorkerProcess:
        queue = place.options["queue"]
        name, environment = f"{place.row}-{queue}-{number}", {}
        if place.peer == "bus":
            environment = dict(stack.environment(agent_of(queue)))
            agent = {"name": f"noop-{queue}", "trust_domain": DOMAIN}
            place = _with(place, worker_config=self._configured(name, agent))
        process = await resources.enter_async_context(
            child_process(
                child_command("worker", place, _CHILD),
                self._folder / f"{name}.log",
                environment | self._profiled(f"{place.row}-worker-{queue}-{number}"),
            )
        )
        return WorkerProcess(process)

    async def _client(
        self, place: Place, number: int, stack: EmbeddedStack, resources: AsyncExitStack
    ) -> ClientProcess:
        name, environment = f"{place.row}-client-{number}", {}
        if place.peer == "bus":
            environment = dict(stack.environment(CLIENT))
            agent = {"name": "bench", "trust_domain": DOMAIN, "path": "client/bench"}
            targets = {f"target_{queue}": str(agent_of(queue)) for queue in self._queues}
            place = _with(place, client_config=self._configured(name, agent), **targets)
        return await resources.enter_async_context(
            client_process(
                place, self._folder / f"{name}.log", environment | self._profiled(name), module=_CHILD
            )
        )

    def _configured(self, name: str, agent: Mapping[str, str]) -> str:
        """Write the configuration of one process of this project: the defaults, where there are any."""
        path = self._folder / f"{name}.yaml"
        audit = {"destination": str(self._folder / "audit" / f"{name}.jsonl")}
        document = {
            "agent": agent,
            "authorization": {"bundle": str(self._grants), "audit": audit},
            "observability": {"metrics": {"port": 0}},
        }
        path.write_text(yaml.safe_dump(document))
        return str(path)

    def _profiled(self, name: str) -> dict[str, str]:
        return {} if self._profiles is None else {PROFILE: str(self._profiles / f"{name}.txt")}


def agent_of(queue: str) -> SpiffeID:
    """Return the identity of the agent of this project that plays a queue."""
    return SpiffeID.of(DOMAIN, "agent", f"noop-{queue}")


def _with(place: Place, **options: str) -> Place:
    return Place(place.row, place.peer, place.address, {**place.options, **options})


def _consumer_of(row: TaskRow, queue: str) -> tuple[str, str]:
    """Return the stream and the consumer of a row's queue."""
    if row.peer == "bus":
        consumer = task_consumer(agent_of(queue), "noop")
        return consumer.stream, consumer.name
    return f"{row.peer}-{queue}", "workers"
