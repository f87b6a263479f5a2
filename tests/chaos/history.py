"""The stored history, read past all of the package's own reading: every message of a stream, in its order.

Whoever reads here may do anything at the broker. What a message says is believed if its signature and chain
verify; whether the messages make sense together is for :mod:`.reconcile` to say.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

from nats.aio.client import Client as NatsClient
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.api import AckPolicy, ConsumerConfig

from agentweave_bus.bus.streams import dead_stream_name, state_stream_name, tasks_stream_name
from agentweave_bus.bus.subjects import Family, agent_prefix
from agentweave_bus.envelope import EnvelopeVerifier, Kind, control_role, decode_payload
from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.identity import Authority, ChainVerifier, IdentitySource, client_context
from agentweave_bus.spiffe_id import SpiffeID
from tests.chaos.plan import AGENT, AUDITOR, DOMAIN, Settings
from tests.integration.connections import Fixed

_BATCH = 500


class Message(NamedTuple):
    """What stands in a stream at ``sequence``."""

    sequence: int
    subject: str
    stored_ms: int
    data: bytes


class Record(NamedTuple):
    """One verified record of a state, as it stands."""

    sequence: int
    slot: int
    number: int
    state: str
    epoch: int
    task: str
    digest: str
    before: str | None
    body: dict[str, Any]


class StepDone(NamedTuple):
    """One verified record of a step."""

    sequence: int
    place: str
    """The last token of its subject, which a step's name makes."""
    value: Any


@dataclass
class History:
    """All that is stored of all tasks, by their keys, each in the stream's order."""

    records: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))
    steps: dict[str, list[StepDone]] = field(default_factory=lambda: defaultdict(list))
    dead: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Which parts of dead letters there are."""
    queued: int = 0
    foreign: list[str] = field(default_factory=list)
    """What stands there and is no genuine record."""


@asynccontextmanager
async def auditor(settings: Settings, authority: Authority) -> AsyncIterator[Auditor]:
    """Connect with every right, and with what it takes to verify."""
    svid = authority.issue(AUDITOR, lifetime=timedelta(hours=1))
    source = IdentitySource(Fixed(svid, authority.bundle))
    await source.start(5)
    client = NatsClient()
    try:
        await client.connect(
            settings.bus_url,
            tls=client_context(source, SpiffeID(settings.broker_id)),
            tls_hostname="127.0.0.1",
            tls_handshake_first=True,
        )
        yield Auditor(client, EnvelopeVerifier(ChainVerifier(source)))
    finally:
        await client.close()
        await source.aclose()


class Auditor:
    """Reads streams. Made by :func:`auditor`."""

    def __init__(self, client: NatsClient, verifier: EnvelopeVerifier) -> None:
        self._client = client
        self._verifier = verifier

    async def queued(self) -> int:
        """Return how many tasks the queue holds, waiting or given out."""
        return (await self._client.jetstream().stream_info(tasks_stream_name(AGENT))).state.messages

    async def history(self) -> History:
        """Read everything."""
        found = History(queued=await self.queued())
        async for message in self._messages(state_stream_name(AGENT)):
            self._take(found, message)
        async for message in self._messages(dead_stream_name(AGENT)):
            *_, key, _epoch, part = message.subject.split(".")
            found.dead[key].add(part)
        return found

    async def _messages(self, stream: str) -> AsyncIterator[Message]:
        js = self._client.jetstream()
        left = (await js.stream_info(stream)).state.messages
        config = ConsumerConfig(ack_policy=AckPolicy.NONE, inactive_threshold=60)
        pulled = await js.pull_subscribe("", stream=stream, config=config)
        while left > 0:
            try:
                batch = await pulled.fetch(min(left, _BATCH), timeout=10)
            except NatsTimeoutError:
                raise AssertionError(f"{left} messages of {stream} are not given out") from None
            for message in batch:
                left -= 1
                about = message.metadata
                stored_ms = int(about.timestamp.timestamp() * 1000)
                yield Message(about.sequence.stream, message.subject, stored_ms, message.data)

    def _take(self, found: History, message: Message) -> None:
        try:
            self._read(found, message)
        except (AgentWeaveError, ValueError, KeyError) as error:
            found.foreign.append(f"{message.subject}: {type(error).__name__}: {error}")

    def _read(self, found: History, message: Message) -> None:
        opened = self._verifier.open_stored(
            message.data, now_ms=time.time_ns() // 1_000_000, stored_at_ms=message.stored_ms
        )
        head, body = opened.head, decode_payload(opened.payload)
        key, place = message.subject.split(".")[-2:]
        if head.kind is not Kind.RECORD or head.sub != message.subject or head.re is None:
            raise ValueError("it is no record of this place")
        if head.iss not in (AGENT, control_role(DOMAIN)):
            raise ValueError(f"{head.iss} has no say here")
        of_steps = f"{_steps_prefix()}.{key}"
        if message.subject.startswith(f"{of_steps}.s"):
            found.steps[key].append(StepDone(message.sequence, place, body))
            return
        found.records[key].append(
            Record(
                sequence=message.sequence,
                slot=int(place),
                number=head.seq if head.seq is not None else -1,
                state=body["state"],
                epoch=head.att if head.att is not None else -1,
                task=head.re.hex(),
                digest=opened.digest.hex(),
                before=None if head.prev is None else head.prev.hex(),
                body=body,
            )
        )


def _steps_prefix() -> str:
    """Return what the subjects of the agent's steps begin with: it stands in the submitter's place, too."""

    prefix = agent_prefix(Family.STATE, AGENT)
    mine = agent_prefix(Family.STATE, AGENT).removeprefix(f"aw.{Family.STATE}.")
    return f"{prefix}.{mine}"
