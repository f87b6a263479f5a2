"""A live world for tests: a real stack, agents and clients on it, and an adversary with a raw connection."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import yaml
from nats.aio.client import Client as NatsClient

from agentweave_bus import (
    AgentWeaveClient,
)
from agentweave_bus.authz.audit_format import LogName
from agentweave_bus.config import AgentConfig, load_config
from agentweave_bus.embedded.stack import EmbeddedStack, StackSettings, embedded_stack
from agentweave_bus.envelope import (
    Sealer,
)
from agentweave_bus.identity import (
    IdentitySource,
    X509Svid,
    client_context,
)
from agentweave_bus.runtime.wiring import Connected
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.connections import Fixed, Raw, heard_within, until
from tests.integration.probes import (
    CLI,
    DOMAIN,
    GRANTS,
    IDENTITIES,
    MALLORY,
    PATIENCE,
    Held,
    Probe,
    Running,
    data_of,
)


class World:
    """A stack and what stands on it. Everything made here is closed with it."""

    def __init__(self, folder: Path, stack: EmbeddedStack) -> None:
        self.folder = folder
        self.stack = stack
        self._grants_before: str | None = None
        self._regranted = False
        self._held: list[Held[Any]] = []
        self._agents: list[Running] = []

    @classmethod
    @asynccontextmanager
    async def make(cls, folder: Path, **settings: Any) -> AsyncIterator[World]:
        grants = folder / "grants.yaml"
        grants.write_text(yaml.safe_dump(settings.pop("grants", GRANTS)))
        before = grants.read_text()
        values: dict[str, Any] = {"identities": IDENTITIES, "unrestricted": (MALLORY,), **settings}
        held = await Held.open(
            embedded_stack(StackSettings(DOMAIN, folder / "state", grants=grants, **values))
        )
        world = cls(folder, held.value)
        world._grants_before = before
        try:
            yield world
        finally:
            try:
                await world.clear()
                await held.value.nats.kill()  # with many streams an orderly end takes it seconds
            finally:
                await held.close()

    async def clear(self) -> None:
        """Stop every agent and client that was not stopped yet; the grants are as they were, at the broker, too."""
        for one in self._agents:
            if not one._task.done():
                await one.crash()
        for held in reversed(self._held):
            await held.close()
        self._agents, self._held = [], []
        if self._regranted and self._grants_before is not None and self.stack.nats.running:
            self._grant(self._grants_before)
            await self.stack.in_line()
            self._regranted = False
        shutil.rmtree(self.folder / "audit", ignore_errors=True)

    # configuration

    def grant(self, grants: Mapping[str, Any]) -> None:
        """Replace the grants."""
        self._regranted = True
        self._grant(yaml.safe_dump(dict(grants)))

    def _grant(self, text: str) -> None:
        draft = self.folder / "grants.new"
        draft.write_text(text)
        draft.replace(self.folder / "grants.yaml")

    def settings(self, identity: SpiffeID, **overrides: Any) -> dict[str, Any]:
        name = identity.path.rpartition("/")[2]
        tree: dict[str, Any] = {
            "agent": {"name": name, "trust_domain": identity.trust_domain, "path": identity.path[1:]},
            "identity": {
                "spiffe_endpoint": self.stack.api.endpoint(identity),
                "authority_history": str(self.folder / "authorities"),
            },
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
