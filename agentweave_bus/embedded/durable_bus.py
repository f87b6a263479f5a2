"""The test's bus over the embedded stack: a real nats-server, mutual TLS, workers in processes of their own.

It is ``agentweave_bus.testing``'s :class:`~agentweave_bus.testing.Bus` by another broker; it stands here
because it is made of this part. Tests get it as the fixture ``durable_bus``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from agentweave_bus.agent import SecureAgent
from agentweave_bus.authz.authorizer import POLL_SECONDS
from agentweave_bus.config import AgentConfig
from agentweave_bus.embedded.stack import EmbeddedStack, StackSettings, embedded_stack
from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.identity import IdentityProvider, X509Bundle
from agentweave_bus.runtime.surroundings import Surroundings
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.supervisor.worker_process import WorkerProcess, WorkerProcesses, WorkerSpec
from agentweave_bus.testing.bus import Bus, reconnects
from agentweave_bus.testing.clock import RealClock
from agentweave_bus.testing.configuration import named_after
from agentweave_bus.testing.participants import Participant
from agentweave_bus.testing.trust import DEFAULT_TRUST_DOMAIN

__all__ = ["DurableBus", "KillableWorker"]

_log = logging.getLogger(__name__)

_STOP_SECONDS: Final = 5.0
_WORKERS_FOLLOW_SECONDS: Final = POLL_SECONDS + 0.5
"""Nothing can be seen from here of a worker in another process; it looks for new grants that often."""


@dataclass(frozen=True, slots=True)
class KillableWorker:
    """A worker in a process of its own. Started by :meth:`DurableBus.start_worker`."""

    spiffe_id: SpiffeID
    process: WorkerProcess

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self.process.running


class DurableBus(Bus):
    """A bus with a real broker; see :class:`~agentweave_bus.testing.Bus`. Its clock is the machine's.

    All who take part are of its trust domain. It opens in about two seconds, because calls can't be claimed
    at once in streams that are new.
    """

    def __init__(self, trust_domain: str = DEFAULT_TRUST_DOMAIN, *, policy: Path | str | None = None) -> None:
        super().__init__(trust_domain, policy=policy)
        self._clock = RealClock()
        self._broker = Participant()
        self._stack: EmbeddedStack | None = None
        self._workers = WorkerProcesses(_log_line, stop_s=_STOP_SECONDS)

    @property
    def clock(self) -> RealClock:
        """The clock of this machine."""
        return self._clock

    @property
    def stack(self) -> EmbeddedStack:
        """The stack. Raises AgentWeaveError before the bus is opened."""
        if self._stack is None:
            raise AgentWeaveError("this bus is not open")
        return self._stack

    async def start_worker(
        self,
        agent: type[SecureAgent] | str,
        *,
        name: str | None = None,
        config: Path | str | None = None,
    ) -> KillableWorker:
        """Serve an agent in a process of its own; returns when it takes calls.

        ``agent`` is a class that can be imported, or ``module:Class``; ``name`` and ``config`` are as for
        :meth:`start`. Started twice it is two replicas.

        Raises:
            WorkerError: it did not become ready; the message ends with what it said last.

        """
        await self.open()
        class_path = agent if isinstance(agent, str) else f"{agent.__module__}:{agent.__qualname__}"
        called = name or (_named_after(agent) if isinstance(agent, str) else named_after(agent))
        made_of = self._config(config, identity=None if config else self.id(f"agent/{called}"))
        identity = made_of.agent.spiffe_id
        await self._enter(identity)
        spec = WorkerSpec(
            name=f"{made_of.agent.name}/{len(self._workers.all) + 1}",
            config=self._written(made_of, len(self._workers.all) + 1),
            class_path=class_path,
            environment=_environment(),
        )
        await self._workers.start([spec])
        return KillableWorker(identity, self._workers[spec.name])

    async def kill_worker(self, agent: SecureAgent | KillableWorker) -> None:
        """End a worker's process with SIGKILL; of an agent in this process see :meth:`Bus.kill_worker`."""
        if isinstance(agent, SecureAgent):
            await super().kill_worker(agent)
            return
        agent.process.kill()
        await agent.process.wait()

    async def rotate_ca(self) -> None:
        """Replace the trust domain's authority; see :meth:`Bus.rotate_ca`.

        Of workers in other processes nobody can see here whether they have followed: they have the time
        that the broker and everybody in this process takes.
        """
        api = self.stack.api
        api.authority.rotate()
        await self._announced(api.authority.bundle)
        participants = self._connected()
        before = [reconnects(one) for one in participants]
        api.rotate()
        await self._until(
            lambda: all(reconnects(one) > count for one, count in zip(participants, before, strict=True)),
            "everyone is connected with a new SVID",
        )
        await self.stack.in_line()
        api.authority.retire()
        await self._announced(api.authority.bundle)

    async def _announced(self, bundle: X509Bundle) -> None:
        """Send the bundle to everyone and wait until the broker and those in this process have it."""
        self.stack.api.announce()
        trusted = self.folder / "state" / "broker" / "authorities.pem"
        await self._until(
            lambda: (
                X509Bundle.from_pem(self.trust_domain, trusted.read_bytes()) == bundle
                and all(one.source.bundle_for(self.trust_domain) == bundle for one in self._connected())
            ),
            "everyone has the new bundle",
        )
        await self.stack.in_line()

    async def _start_broker(self) -> None:
        settings = StackSettings(
            self.trust_domain,
            self.folder / "state",
            identities=tuple(sorted({self.id("client/cli"), *self._granted()})),
            grants=self._policy,
        )

        async def live() -> None:
            async with embedded_stack(settings, settle=False) as stack:
                self._stack = stack
                self._broker.ready.set()
                await self._broker.leave.wait()

        await self._broker.begin(live)

    async def _stop_broker(self) -> None:
        try:
            await self._workers.stop()
        finally:
            self._stack = None
            await self._broker.stop()

    async def _enter(self, identity: SpiffeID) -> None:
        await self.stack.admit(identity)
        await self.stack.settled()

    async def _follow_grants(self) -> None:
        await self.stack.admit(*self._granted())
        await self.stack.in_line()
        if any(worker.running for worker in self._workers.all):
            await asyncio.sleep(_WORKERS_FOLLOW_SECONDS)

    def _granted(self) -> set[SpiffeID]:
        """Return the identities of this domain that the grants name."""
        grants = self.grants.grants
        named = {one for grant in grants for one in (*grant.caller, *grant.callee) if not one.endswith("/*")}
        return {one for text in named if (one := SpiffeID(text)).trust_domain == self.trust_domain}

    def _provider(self, config: AgentConfig) -> IdentityProvider | None:  # noqa: ARG002 - the Workload API's
        return None

    def _surroundings(self, participant: Participant) -> Surroundings:
        return Surroundings(
            around_engine=self._switch.around,
            stop_signals=participant.signals,
            on_wired=participant.wired,
        )

    def _place(self, identity: SpiffeID) -> dict[str, Any]:
        return {
            "identity.provider": "spiffe",
            "identity.spiffe_endpoint": self.stack.api.endpoint(identity),
            "bus.servers": [self.stack.bus_url],
            "bus.server_spiffe_id": str(self.stack.broker_id),
        }

    def _written(self, config: AgentConfig, number: int) -> Path:
        folder = self.folder / "workers"
        folder.mkdir(exist_ok=True)
        path = folder / f"{config.agent.name}-{number}.yaml"
        tree = config.model_dump(mode="json", by_alias=True, exclude_none=True)
        path.write_text(yaml.safe_dump(tree))
        return path


def _environment() -> Mapping[str, str]:
    """Let a worker import what this process can, from where it can."""
    return {
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
        "AGENTWEAVE_ENV": "production",
    }


def _named_after(class_path: str) -> str:
    return named_after(type(class_path.rpartition(":")[2], (), {}))


def _log_line(name: str, line: str) -> None:
    _log.info("%s: %s", name, line)
