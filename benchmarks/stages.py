"""What each stage of a call costs by itself: the parts of the product, wired as in a worker, one at a time.

A stage is run many times in a row, in short series; what counts is the time of a series by the number of
its calls. Waiting for the policy server or the broker is part of ``authorize`` and ``claim``.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from agentweave_bus.authz import AuthzContext
from agentweave_bus.bus.claims import ClaimOutcome, Claims
from agentweave_bus.bus.records import decision_facts, sealed_facts
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.config import load_config
from agentweave_bus.embedded.stack import EmbeddedStack, StackSettings, embedded_stack
from agentweave_bus.envelope import (
    Draft,
    Kind,
    Link,
    OpenedEnvelope,
    claim_key,
    decode_payload,
    encode_payload,
    extend_via,
    new_id,
    verify_delegation,
)
from agentweave_bus.runtime import Connected, connected
from agentweave_bus.runtime.wiring import clock_ms
from agentweave_bus.spiffe_id import SpiffeID
from benchmarks.opa_server import opa_server
from benchmarks.peers.bus import Echo
from benchmarks.places import PAYLOAD
from benchmarks.results import Figure, StageFigure
from benchmarks.world import CLIENT, DOMAIN, write_grants

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["measure_stages"]

_SERIES: Final = 15
_CALLS: Final = 64
_TOGETHER: Final = 16
_AGENTS: Final = tuple(SpiffeID.of(DOMAIN, "agent", f"stage-{number}") for number in range(5))
_PAYLOAD: Final = {"text": PAYLOAD, "size": len(PAYLOAD)}

Once = Callable[[], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class _Bench:
    """Everybody who takes part: the client, and agents that call one another in a row."""

    client: Connected
    agents: Sequence[Connected]
    opa: Connected
    claims: Claims

    @property
    def worker(self) -> Connected:
        return self.agents[0]


async def measure_stages() -> list[StageFigure]:
    """Measure every stage; takes about half a minute."""
    with tempfile.TemporaryDirectory(prefix="agentweave-bench-") as folder:
        async with _bench(Path(folder)) as bench:
            return [figure async for figure in _stages(bench)]


async def _stages(bench: _Bench) -> AsyncIterator[StageFigure]:
    yield await _seal(bench)
    yield await _open(bench)
    for links in (1, 2, 4):
        yield await _delegate(bench, links)
    yield await _validate(bench)
    yield await _authorize("authorize: embedded, in full", bench.worker, "limited")
    yield await _authorize("authorize: standing answer", bench.worker, "echo")
    yield await _authorize("authorize: OPA as a server", bench.opa, "limited")
    yield await _audit(bench)
    yield await _keep_frame(bench)
    yield await _dispatch(bench)
    yield await _claim(bench)


# --- how a stage is timed --------------------------------------------------------------------------------


async def _timed(once: Once, calls: int = _CALLS) -> Figure:
    """Time ``once`` in series of ``calls``; microseconds each."""
    found = []
    for series in range(_SERIES + 1):
        with _no_collections():
            began = time.perf_counter_ns()
            for _ in range(calls):
                await once()
            took = time.perf_counter_ns() - began
        if series:  # the first warms up
            found.append(took / calls / 1000)
    return Figure.of(found)


async def _timed_together(once: Once, calls: int = _CALLS) -> Figure:
    """Time ``once`` as 16 tasks at a time."""

    async def sixteen() -> None:
        await asyncio.gather(*(once() for _ in range(_TOGETHER)))

    figure = await _timed(sixteen, max(1, calls // _TOGETHER))
    return Figure(*(value / _TOGETHER for value in (figure.median, figure.low, figure.high)))


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keep the garbage collector out of a series: whose garbage it finds is chance."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _at_once(function: Callable[[], Any]) -> Once:
    async def once() -> None:
        function()

    return once


# --- the stages ------------------------------------------------------------------------------------------


def _draft(target: SpiffeID, via: tuple[Link, ...] = ()) -> Draft:
    now_ms = clock_ms()
    return Draft(
        kind=Kind.CALL,
        id=new_id(clock_ms()),
        aud=target,
        cap="echo",
        sub=call_subject(target, "echo"),
        iat=now_ms,
        exp=via[-1].head.exp if via else now_ms + 30_000,
        reply="A" * 22,
    )


async def _sealed(sender: Connected, target: SpiffeID, via: tuple[Link, ...] = ()) -> bytes:
    return (await sender.sealer.seal(_draft(target, via), encode_payload(_PAYLOAD), via)).frame


def _opened(receiver: Connected, frame: bytes) -> OpenedEnvelope:
    return receiver.verifier.open(frame, now_ms=clock_ms())


async def _seal(bench: _Bench) -> StageFigure:
    payload = encode_payload(_PAYLOAD)

    async def once() -> None:
        await bench.client.sealer.seal(_draft(bench.worker.me), payload)

    return StageFigure("seal", await _timed(once), await _timed_together(once, 256))


async def _open(bench: _Bench) -> StageFigure:
    """Open frames that were never seen; together: 16 under one signature, as they leave a busy sender."""

    async def frames(at_a_time: int) -> Iterator[bytes]:
        batches = [
            await asyncio.gather(*(_sealed(bench.client, bench.worker.me) for _ in range(at_a_time)))
            for _ in range((_SERIES + 1) * _CALLS // at_a_time)
        ]
        return itertools.chain.from_iterable(batches)

    single, batched = await frames(1), await frames(_TOGETHER)
    return StageFigure(
        "open",
        await _timed(_at_once(lambda: _opened(bench.worker, next(single)))),
        await _timed(_at_once(lambda: _opened(bench.worker, next(batched)))),
    )


async def _delegate(bench: _Bench, links: int) -> StageFigure:
    """Verify delegations of so many links, all of them new; together: 16 calls made for one request."""
    receiver = bench.agents[links]

    async def nested(parents: int, calls: int) -> list[OpenedEnvelope]:
        found = []
        for _ in range(parents):
            via = await _chain(bench, links)
            sender = bench.agents[links - 1]
            frames = await asyncio.gather(*(_sealed(sender, receiver.me, via) for _ in range(calls)))
            found += [_opened(receiver, frame) for frame in frames]
        return found

    count = (_SERIES + 1) * _CALLS // 4
    single = iter(await nested(count, 1))
    batched = iter(await nested(count // _TOGETHER, _TOGETHER))

    def verify(one: OpenedEnvelope) -> None:
        verify_delegation(one, receiver.verifier, now_ms=clock_ms())

    return StageFigure(
        f"delegate: via of {links}",
        await _timed(_at_once(lambda: verify(next(single))), _CALLS // 4),
        await _timed(_at_once(lambda: verify(next(batched))), _CALLS // 4),
    )


async def _chain(bench: _Bench, links: int) -> tuple[Link, ...]:
    """Have the client call the first agent, that one the second, and so on; return what the last proves."""
    via: tuple[Link, ...] = ()
    sender = bench.client
    for receiver in bench.agents[:links]:
        via = extend_via(_opened(receiver, await _sealed(sender, receiver.me, via)))
        sender = receiver
    return via


async def _validate(bench: _Bench) -> StageFigure:
    capability = _echo(bench).capability_table["echo"]
    payload = encode_payload(_PAYLOAD)
    return StageFigure(
        "validate", await _timed(_at_once(lambda: capability.validate(decode_payload(payload))))
    )


def _echo(bench: _Bench) -> Echo:
    return Echo(bench.worker.config)


def _question(callee: SpiffeID, capability: str) -> AuthzContext:
    return AuthzContext(
        caller=CLIENT,
        callee=callee,
        action=capability,
        direction="inbound",
        payload=_PAYLOAD,
        task_id=new_id(clock_ms()),
        kind="call",
        transport="bus",
    )


async def _authorize(name: str, agent: Connected, capability: str) -> StageFigure:
    async def once() -> None:
        decision = await agent.authorizer.authorize(_question(agent.me, capability))
        if not decision.allowed:
            raise RuntimeError(decision.reason)

    return StageFigure(name, await _timed(once), await _timed_together(once))


async def _audit(bench: _Bench) -> StageFigure:
    worker = bench.worker
    request = await bench.client.sealer.seal(_draft(worker.me), encode_payload(_PAYLOAD))
    facts = _question(worker.me, "echo")
    decision = await worker.authorizer.authorize(facts)

    def append() -> None:
        record = {"event": "admission", **sealed_facts(request), **decision_facts(facts, decision)}
        worker.audit.append(record)

    return StageFigure("audit: append an admission", await _timed(_at_once(append)))


async def _keep_frame(bench: _Bench) -> StageFigure:
    frame = await _sealed(bench.client, bench.worker.me)
    return StageFigure(
        "audit: keep a frame (not safe only)",
        await _timed(_at_once(lambda: bench.worker.audit.keep_frame(os.urandom(32), frame))),
    )


async def _dispatch(bench: _Bench) -> StageFigure:
    """Run the handler and turn what it returns into the bytes of an answer."""
    capability = _echo(bench).capability_table["echo"]
    call = capability.validate(decode_payload(encode_payload(_PAYLOAD)))

    async def once() -> None:
        encode_payload((await capability.invoke(call)).to_json())

    return StageFigure("dispatch", await _timed(once))


async def _claim(bench: _Bench) -> StageFigure:
    async def once() -> None:
        key = claim_key(CLIENT, bench.worker.me, "claimed", new_id(clock_ms()))
        claim = await bench.claims.begin(key, os.urandom(32))
        if await claim.outcome() is not ClaimOutcome.HELD:
            raise RuntimeError("a new call could not be claimed")

    return StageFigure("claim", await _timed(once), await _timed_together(once))


# --- who takes part --------------------------------------------------------------------------------------


@asynccontextmanager
async def _bench(folder: Path) -> AsyncIterator[_Bench]:
    grants = folder / "grants.yaml"
    write_grants(grants, _AGENTS)
    settings = StackSettings(DOMAIN, folder / "stack", (*_AGENTS, CLIENT), grants)
    async with embedded_stack(settings) as stack, AsyncExitStack() as resources:
        opa_url, _pid = await resources.enter_async_context(opa_server(stack.api.directory, grants))
        embedded = {"bundle": str(grants)}
        wired: list[Claims] = []

        def claiming(parts: Connected) -> None:
            wired.append(Claims(parts.me, parts.keeper))
            parts.keeper.on_session(wired[0].on_session)

        def calling(_parts: Connected) -> None:
            """Wire nothing: it is not called."""

        async def joined(
            who: SpiffeID, authorization: Mapping[str, Any], wire: Callable[[Connected], None] = calling
        ) -> Connected:
            config = _configuration(folder, stack, who, authorization)
            return await resources.enter_async_context(connected(config, serve=wire))

        agents = [await joined(_AGENTS[0], embedded, claiming)]
        agents += [await joined(who, embedded) for who in _AGENTS[1:]]
        opa = await joined(_AGENTS[0], {"provider": "opa", "opa_endpoint": opa_url, "timeout_ms": 5000})
        yield _Bench(await joined(CLIENT, embedded), agents, opa, wired[0])


def _configuration(
    folder: Path, stack: EmbeddedStack, who: SpiffeID, authorization: Mapping[str, Any]
) -> Any:
    name = who.path.rpartition("/")[2]
    audit = {
        "destination": str(folder / "audit" / f"{name}-{authorization.get('provider', 'embedded')}.jsonl")
    }
    path = folder / f"{name}.yaml"
    document = {
        "agent": {"name": name, "trust_domain": DOMAIN, "path": who.path.lstrip("/")},
        "authorization": {**authorization, "audit": audit},
        "identity": {"spiffe_endpoint": stack.api.endpoint(who)},
        "bus": {"servers": [stack.bus_url], "server_spiffe_id": str(stack.broker_id)},
    }
    path.write_text(yaml.safe_dump(document))
    return load_config(path)
