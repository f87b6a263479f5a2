"""A live world for tests: a real stack, agents and clients on it, and an adversary with a raw connection.

What is held open (stack, agents, clients) lives in a task of its own, because task groups must be left in
the task that entered them, and fixtures and tests are different tasks.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Generic, TypeVar

import anyio
import anyio.to_thread
import yaml
from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg

from agentweave_bus import (
    AgentWeaveClient,
    DataPart,
    Message,
    SecureAgent,
    TaskFailedError,
    TaskResult,
    capability,
    requires_peer,
)
from agentweave_bus.authz.audit_format import LogName
from agentweave_bus.config import AgentConfig, load_config
from agentweave_bus.embedded.stack import EmbeddedStack, StackSettings, embedded_stack
from agentweave_bus.envelope import (
    Draft,
    Head,
    Kind,
    Sealed,
    Sealer,
    decode_frame,
    encode_payload,
    head_digest,
    new_id,
    parse_head,
)
from agentweave_bus.identity import (
    IdentityProvider,
    IdentitySource,
    X509Bundle,
    X509Svid,
    client_context,
)
from agentweave_bus.runtime import Runner
from agentweave_bus.runtime.wiring import Connected, clock_ms
from agentweave_bus.spiffe_id import SpiffeID

T = TypeVar("T")

DOMAIN = "demo.test"
ECHO = SpiffeID(f"spiffe://{DOMAIN}/agent/echo")
FRONT = SpiffeID(f"spiffe://{DOMAIN}/agent/front")
MIDDLE = SpiffeID(f"spiffe://{DOMAIN}/agent/middle")
ABSENT = SpiffeID(f"spiffe://{DOMAIN}/agent/Absent")  # an upper-case letter: paths may have them
CLI = SpiffeID(f"spiffe://{DOMAIN}/client/cli")
OTHER = SpiffeID(f"spiffe://{DOMAIN}/client/other")
MALLORY = SpiffeID(f"spiffe://{DOMAIN}/client/mallory")
IDENTITIES = (ECHO, FRONT, MIDDLE, ABSENT, CLI, OTHER)

PATIENCE = 15.0
"""Seconds after which an event that should come at once counts as missing."""

GRANTS: dict[str, Any] = {
    "grants": [
        {
            "caller": str(CLI),
            "callee": [str(ECHO), str(ABSENT)],
            "capabilities": ["*"],
            "principals": ["https://login.example"],
        },
        {
            "caller": str(CLI),
            "callee": [str(FRONT), str(MIDDLE)],
            "capabilities": ["relay"],
            "principals": ["https://login.example"],
        },
        {"caller": str(FRONT), "callee": [str(MIDDLE)], "capabilities": ["relay"]},
        {"caller": str(FRONT), "callee": [str(ECHO)], "capabilities": ["whoami", "say", "work", "wait"]},
        {"caller": str(MIDDLE), "callee": [str(ECHO)], "capabilities": ["whoami", "say"]},
    ]
}


# --- holding things open --------------------------------------------------------------------------


class Held(Generic[T]):
    """A context manager that is held open by a task of its own."""

    def __init__(self, task: asyncio.Task[None], value: T, leave: asyncio.Event) -> None:
        self._task = task
        self._leave = leave
        self.value = value

    @classmethod
    async def open(cls, manager: AbstractAsyncContextManager[T]) -> Held[T]:
        entered: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        leave = asyncio.Event()
        task = asyncio.create_task(_hold(manager, entered, leave))
        await asyncio.wait({task, entered}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        if task.done() and not entered.done():
            task.result()
        assert entered.done(), "not entered within a minute"
        return cls(task, entered.result(), leave)

    async def close(self) -> None:
        self._leave.set()
        async with asyncio.timeout(60):
            await self._task


async def _hold(
    manager: AbstractAsyncContextManager[T], entered: asyncio.Future[T], leave: asyncio.Event
) -> None:
    async with manager as value:
        entered.set_result(value)
        await leave.wait()


# --- agents ---------------------------------------------------------------------------------------


class Probe(SecureAgent):
    """An agent whose tests can see what it did and hold it where they like."""

    def __init__(self, config: AgentConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.ran: list[str] = []
        self.entered = asyncio.Event()
        self.gate = asyncio.Event()
        self.thread_gate = threading.Event()
        self.svids: list[X509Svid] = []
        self.started = asyncio.Event()
        self.stopped = False
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.on_rotation = asyncio.Event()
        self.most_at_once = 0
        self._at_once = 0

    async def on_start(self) -> None:
        await self.may_start.wait()
        self.started.set()

    async def on_stop(self) -> None:
        self.stopped = True

    async def on_svid_update(self, new_svid: X509Svid) -> None:
        self.svids.append(new_svid)
        self.on_rotation.set()

    @property
    def parts(self) -> Connected:
        return self._SecureAgent__runtime._parts  # type: ignore[attr-defined,no-any-return]

    @capability("say", safe=True)
    async def say(self, text: str) -> dict[str, Any]:
        """Do no harm, however often."""
        self.ran.append("say")
        return {"said": text}

    @capability("work")
    async def work(self, text: str = "") -> dict[str, Any]:
        """Do something that must not be done twice."""
        self.ran.append("work")
        return {"worked": text}

    @capability("wait")
    async def wait(self) -> dict[str, Any]:
        """Wait for the test's gate."""
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.ran.append("wait")
            self.entered.set()
            await self.gate.wait()
        finally:
            self._at_once -= 1
        return {"waited": True}

    @capability("wait_safe", safe=True)
    async def wait_safe(self) -> dict[str, Any]:
        """Likewise, and harmless."""
        return await self.wait()

    @capability("block")
    def block(self) -> dict[str, Any]:
        """Block a thread until the test lets go."""
        self.ran.append("block")
        self.get_loop().call_soon_threadsafe(self.entered.set)
        assert self.thread_gate.wait(PATIENCE)
        return {"blocked": True}

    @capability("boom")
    async def boom(self) -> dict[str, Any]:
        """Fail in an unexpected way."""
        raise RuntimeError("a secret of the handler")

    @capability("decline")
    async def decline(self) -> dict[str, Any]:
        """Fail in words for the caller."""
        raise TaskFailedError("out of stock")

    @capability("huge")
    async def huge(self, size: int) -> dict[str, Any]:
        """Answer with as many bytes as asked for."""
        return {"text": "x" * size}

    @capability("inner")
    @requires_peer(f"spiffe://{DOMAIN}/agent/*")
    async def inner(self) -> dict[str, Any]:
        """For agents only, whatever the grants say."""
        self.ran.append("inner")
        return {}

    @capability("whoami")
    async def whoami(self) -> dict[str, Any]:
        """Say what the verified request says."""
        context = self.context
        self.ran.append("whoami")
        return {
            "caller": context.caller_spiffe_id,
            "via": [{"iss": str(link.iss), "aud": str(link.aud), "cap": link.cap} for link in context.via],
            "principal": None if context.principal is None else dict(context.principal),
            "deadline_ms": context.deadline_ms,
            "scope": context.links[-1].head.scope and list(context.links[-1].head.scope),
        }

    @capability("relay")
    async def relay(self, path: list[str], name: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Ask the next agent on the path; the last one for ``name``."""
        self.ran.append("relay")
        target, *rest = path
        if rest:
            name, payload = "relay", {"path": rest, "name": name, "payload": payload}
        result = await self.call_agent(target, name, payload, timeout=300)
        return {"status": result.status, "value": data_of(result), "error": result.error}

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self.loop

    loop: asyncio.AbstractEventLoop


def data_of(result: Any) -> Any:
    """The data of a result's first part."""
    if not result.messages:
        return None
    return result.messages[0].parts[0].data


_STOP: ContextVar[asyncio.Event] = ContextVar("stop")


async def stop_asked_for() -> None:
    """Stands for the signals: a test stops one agent of several in its process, which no signal can."""
    await _STOP.get().wait()


class Running:
    """An agent served in this process, by the same runner as in its own."""

    def __init__(self, agent: Probe) -> None:
        self.agent = agent
        self._stop = asyncio.Event()
        agent.loop = asyncio.get_running_loop()
        token = _STOP.set(self._stop)
        self._task = asyncio.create_task(Runner().run(agent))
        _STOP.reset(token)

    async def ready(self) -> Running:
        await self.until(self.agent.started)
        return self

    async def until(self, event: asyncio.Event) -> None:
        """Wait for an event, or the agent's end, whose error is raised."""
        waiter = asyncio.create_task(event.wait())
        await asyncio.wait({self._task, waiter}, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if self._task.done():
            self._task.result()
        assert event.is_set()

    def ask_to_stop(self) -> None:
        self._stop.set()

    async def stop(self) -> None:
        """As SIGTERM does."""
        self._stop.set()
        async with asyncio.timeout(40):
            await self._task

    async def crash(self) -> None:
        """As near to a crash as a task can come: nothing is drained."""
        self._task.cancel()
        await asyncio.wait({self._task}, timeout=PATIENCE)


# --- identities and raw connections ---------------------------------------------------------------


class Fixed(IdentityProvider):
    """An identity that the test makes itself: expired soon, from another domain, or anybody's."""

    def __init__(self, svid: X509Svid, *bundles: X509Bundle) -> None:
        self.svid = svid
        self.bundles = {one.trust_domain: one for one in bundles}
        self._changed = asyncio.Event()

    async def get_svid(self) -> X509Svid:
        return self.svid

    async def get_trust_bundle(self, trust_domain: str) -> X509Bundle:
        return self.bundles[trust_domain]

    def get_spiffe_id(self) -> str:
        return str(self.svid.spiffe_id)

    async def wait_for_update(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def replace(self, svid: X509Svid) -> None:
        self.svid = svid
        self._changed.set()


class Raw:
    """A connection to the broker that knows no rules: what somebody with an SVID and a library can do."""

    def __init__(self, client: NatsClient, source: IdentitySource) -> None:
        self.client = client
        self.source = source
        self.sealer = Sealer(lambda: source.svid)
        self.refused: list[str] = []
        self.refusal = asyncio.Event()

    async def listen(self, subject: str) -> asyncio.Queue[Msg]:
        heard: asyncio.Queue[Msg] = asyncio.Queue()

        async def received(message: Msg) -> None:
            heard.put_nowait(message)

        await self.client.subscribe(subject, cb=received)
        await self.flush()
        return heard

    async def flush(self) -> None:
        """Wait until the broker has everything. Twice: the library's ping overtakes its own buffer."""
        await self.client.flush()
        await self.client.flush()

    async def send(
        self, subject: str, data: bytes, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        await self.client.publish(subject, data, reply, headers)
        await self.flush()

    async def denied(self, act: Awaitable[Any]) -> str:
        """Do something and return what the broker says against it."""
        self.refusal.clear()
        await act
        async with asyncio.timeout(PATIENCE):
            await self.refusal.wait()
        return self.refused[-1]


async def heard_within(queue: asyncio.Queue[Msg], what: str = "message") -> Msg:
    """The next message; missing it is a failure."""
    try:
        async with asyncio.timeout(PATIENCE):
            return await queue.get()
    except TimeoutError:
        raise AssertionError(f"no {what} within {PATIENCE:g} s") from None


async def until(check: Callable[[], bool], what: str) -> None:
    """Wait for something that announces itself to nobody, such as a file or a counter."""
    give_up = time.monotonic() + PATIENCE
    while not check():
        assert time.monotonic() < give_up, f"{what}: not within {PATIENCE:g} s"
        await asyncio.sleep(0.01)


# --- the world ------------------------------------------------------------------------------------


class World:
    """A stack and what stands on it. Everything made here is closed with it."""

    def __init__(self, folder: Path, stack: EmbeddedStack) -> None:
        self.folder = folder
        self.stack = stack
        self._held: list[Held[Any]] = []
        self._agents: list[Running] = []

    @classmethod
    @asynccontextmanager
    async def make(cls, folder: Path, **settings: Any) -> AsyncIterator[World]:
        grants = folder / "grants.yaml"
        grants.write_text(yaml.safe_dump(settings.pop("grants", GRANTS)))
        values: dict[str, Any] = {"identities": IDENTITIES, "unrestricted": (MALLORY,), **settings}
        held = await Held.open(
            embedded_stack(StackSettings(DOMAIN, folder / "state", grants=grants, **values))
        )
        world = cls(folder, held.value)
        try:
            yield world
        finally:
            try:
                await world.clear()
            finally:
                await held.close()

    async def clear(self) -> None:
        """Stop every agent and client that was not stopped yet."""
        for one in self._agents:
            if not one._task.done():
                await one.crash()
        for held in reversed(self._held):
            await held.close()
        self._agents, self._held = [], []
        shutil.rmtree(self.folder / "audit", ignore_errors=True)

    # configuration

    def grant(self, grants: Mapping[str, Any]) -> None:
        """Replace the grants."""
        draft = self.folder / "grants.new"
        draft.write_text(yaml.safe_dump(dict(grants)))
        draft.replace(self.folder / "grants.yaml")

    def settings(self, identity: SpiffeID, **overrides: Any) -> dict[str, Any]:
        name = identity.path.rpartition("/")[2]
        tree: dict[str, Any] = {
            "agent": {"name": name, "trust_domain": identity.trust_domain, "path": identity.path[1:]},
            "identity": {"spiffe_endpoint": self.stack.api.endpoint(identity)},
            "bus": {"servers": [self.stack.bus_url], "server_spiffe_id": str(self.stack.broker_id)},
            "authorization": {
                "bundle": str(self.folder / "grants.yaml"),
                "audit": {"destination": str(self.folder / "audit" / f"{name}.jsonl")},
            },
            "observability": {"metrics": {"enabled": False}},
        }
        for dotted, value in overrides.items():
            *sections, key = dotted.split("__")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
        return tree

    def config(self, identity: SpiffeID, **overrides: Any) -> AgentConfig:
        return load_config(overrides=self.settings(identity, **overrides), environment="production")

    # participants

    async def agent(
        self, identity: SpiffeID, kind: type[Probe] = Probe, *, provider: Any = None, **overrides: Any
    ) -> Probe:
        """An agent that takes calls now."""
        running = await self.start(identity, kind, provider=provider, **overrides)
        await running.ready()
        return running.agent

    async def start(
        self, identity: SpiffeID, kind: type[Probe] = Probe, *, provider: Any = None, **overrides: Any
    ) -> Running:
        running = Running(kind(self.config(identity, **overrides), identity_provider=provider))
        self._agents.append(running)
        return running

    def running(self, agent: Probe) -> Running:
        return next(one for one in self._agents if one.agent is agent)

    async def client(self, identity: SpiffeID = CLI, *, provider: Any = None, **overrides: Any) -> Caller:
        held = await Held.open(
            AgentWeaveClient(self.config(identity, **overrides), identity_provider=provider)
        )
        self._held.append(held)
        return Caller(held.value)

    async def raw(self, identity: SpiffeID = MALLORY, *, svid: X509Svid | None = None) -> Raw:
        """Connect past all of this package. ``svid`` is what it then seals with; connecting is as itself."""
        held = await Held.open(self._raw(identity, svid))
        self._held.append(held)
        return held.value

    @asynccontextmanager
    async def _raw(self, identity: SpiffeID, svid: X509Svid | None) -> AsyncIterator[Raw]:
        mine = self.stack.api.authority.issue(identity, lifetime=_hour())
        source = IdentitySource(Fixed(mine, self.stack.api.authority.bundle))
        await source.start(5)
        client = NatsClient()
        raw = Raw(client, source)
        if svid is not None:
            raw.sealer = Sealer(lambda: svid)

        async def error(problem: Exception) -> None:
            raw.refused.append(str(problem))
            raw.refusal.set()

        await client.connect(
            self.stack.bus_url,
            tls=client_context(source, self.stack.broker_id),
            tls_hostname="127.0.0.1",
            tls_handshake_first=True,
            allow_reconnect=False,
            error_cb=error,
        )
        try:
            yield raw
        finally:
            await client.close()
            await source.aclose()

    def issue(self, identity: SpiffeID, **options: Any) -> X509Svid:
        options.setdefault("lifetime", _hour())
        return self.stack.api.authority.issue(identity, **options)

    # what was written down

    def audit(self, name: str, **wanted: Any) -> list[dict[str, Any]]:
        """The records of an audit log, in order, of which each of ``wanted`` holds."""
        records: list[dict[str, Any]] = []
        for file in LogName.of(self.folder / "audit" / f"{name}.jsonl").files():
            records += [json.loads(line) for line in file.read_text().splitlines()]
        records.sort(key=lambda one: (one["ts"], one["seq"]))
        return [one for one in records if all(one.get(key) == value for key, value in wanted.items())]

    def refusals(self, name: str, **wanted: Any) -> list[dict[str, Any]]:
        return self.audit(name, event="refusal", **wanted)

    async def refusal(self, name: str, *, after: int = 0, **wanted: Any) -> dict[str, Any]:
        """The refusal number ``after`` + 1 in an audit log, once it is there."""
        await until(lambda: len(self.refusals(name, **wanted)) > after, f"a refusal of {wanted} by {name}")
        return self.refusals(name, **wanted)[after]

    # the broker

    async def stored(self, raw: Raw, stream: str) -> int:
        """How many messages a stream holds."""
        heard = await raw.listen("probe.answer")
        await raw.send(f"$JS.API.STREAM.INFO.{stream}", b"", "probe.answer")
        return int(json.loads((await heard_within(heard)).data)["state"]["messages"])


class Caller:
    """A client, with its inside open to tests."""

    def __init__(self, client: AgentWeaveClient) -> None:
        self.client = client
        self.call = client.call

    @property
    def parts(self) -> Connected:
        assert self.client._parts is not None
        return self.client._parts

    async def ask(self, target: SpiffeID, name: str, payload: Any = None, **options: Any) -> Any:
        """Call, expect success, return the data."""
        options.setdefault("timeout", PATIENCE)
        result = await self.call(str(target), name, payload, **options)
        assert result.status == "completed", result
        return data_of(result)

    def dropped(self, reason: str) -> float:
        return metric(self.parts, "agentweave_replies_dropped_total", reason=reason)


def metric(parts: Connected, name: str, **labels: str) -> float:
    value = parts.metrics.registry.get_sample_value(name, labels)
    return 0.0 if value is None else value


def _hour() -> Any:
    from datetime import timedelta

    return timedelta(hours=1)


# --- worker processes -----------------------------------------------------------------------------

AGENT_FILE = """
import asyncio, os, time
from agentweave_bus import SecureAgent, capability

class Worker(SecureAgent):
    @capability("say", safe=True)
    async def say(self, text: str) -> dict:
        return {"said": text, "pid": os.getpid(), "caller": self.context.caller_spiffe_id}

    @capability("work")
    async def work(self, text: str = "") -> dict:
        return {"worked": text, "pid": os.getpid()}

    @capability("wait")
    async def wait(self, mark: str, until: str) -> dict:
        open(mark, "w").close()
        while not os.path.exists(until):
            await asyncio.sleep(0.01)
        return {"waited": True, "pid": os.getpid()}

class Broken(SecureAgent):
    async def on_start(self) -> None:
        raise RuntimeError("no database")
"""


class Worker:
    """A worker process that has said ready."""

    def __init__(self, process: subprocess.Popen[bytes], ready: str, log: Path) -> None:
        self.process = process
        self.ready = ready
        self.log = log

    async def wait(self) -> int:
        async with asyncio.timeout(PATIENCE + 30):
            return await anyio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True)


@asynccontextmanager
async def worker_process(
    world: World, identity: SpiffeID, *, klass: str = "live_agents:Worker", **overrides: Any
) -> AsyncIterator[Worker]:
    """Start ``python -m agentweave_bus.worker`` and wait for its word, or its end."""
    folder = world.folder / f"process-{time.monotonic_ns()}"
    folder.mkdir()
    (folder / "live_agents.py").write_text(AGENT_FILE)
    tree = world.settings(identity, **overrides)
    tree["agent"]["class"] = klass
    (folder / "agent.yaml").write_text(yaml.safe_dump(tree))
    reading, writing = os.pipe()
    log = folder / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen(  # noqa: ASYNC220 - takes a millisecond
            [sys.executable, "-m", "agentweave_bus.worker", "agent.yaml"],
            cwd=folder,
            env={**os.environ, "AGENTWEAVE_READY_FD": str(writing)},
            pass_fds=[writing],
            stderr=errors,
        )
    os.close(writing)
    try:
        async with asyncio.timeout(PATIENCE + 15):
            said = await anyio.to_thread.run_sync(os.read, reading, 200, abandon_on_cancel=True)
        yield Worker(process, said.decode(), log)
    finally:
        os.close(reading)
        if process.poll() is None:
            process.kill()
        await anyio.to_thread.run_sync(process.wait)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# --- playing the callee ---------------------------------------------------------------------------


def request_of(message: Msg) -> tuple[Head, bytes]:
    """The head of a call as it went over the wire, and its digest."""
    frame = decode_frame(message.data)
    return parse_head(frame.head), head_digest(frame.head)


def reply_to(message: Msg, svid: X509Svid, value: Any = None, **changes: Any) -> Sealed:
    """Answer a call as who holds ``svid``; ``changes`` are to the head of the honest answer."""
    head, digest = request_of(message)
    now = clock_ms()
    values: dict[str, Any] = {
        "kind": Kind.REPLY,
        "id": new_id(now),
        "aud": head.iss,
        "cap": head.cap,
        "sub": message.reply,
        "iat": now,
        "exp": now + 30_000,
        "re": digest,
    } | changes
    body = result_of({"answer": "forged"}) if value is None else value
    return Sealer(lambda: svid).seal_now(Draft(**values), encode_payload(body))


def result_of(data: dict[str, Any]) -> dict[str, Any]:
    return TaskResult(
        status="completed", messages=[Message(role="assistant", parts=[DataPart(data)])]
    ).to_json()
