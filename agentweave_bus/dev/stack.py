"""The stack of ``agentweave dev``: that of ``up``, with its agents in this process and a clock that rests."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from agentweave_bus.bus.requests import Answer, Request
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.client import Transport
from agentweave_bus.config import StackConfig
from agentweave_bus.dev.arrivals import PatientClient
from agentweave_bus.dev.concerned import WatchedStack
from agentweave_bus.dev.modules import variables_of_all
from agentweave_bus.dev.rest import RestingClock
from agentweave_bus.dev.serving import ServedAgents, served_agents
from agentweave_bus.embedded.assembly import (
    RunningStack,
    client_files,
    locked_stack,
    overrides,
    plan_agents,
    worker_plans,
)
from agentweave_bus.runtime import Connected
from agentweave_bus.runtime.surroundings import Surroundings
from agentweave_bus.supervisor.plans import PlannedAgent
from agentweave_bus.supervisor.worker_process import WorkerSpec

__all__ = ["ENVIRONMENT", "DevStack", "dev_stack"]

ENVIRONMENT: Final = "development"

_ACK_WAIT: Final = "AGENTWEAVE_BUS__TASK_ACK_WAIT"
_ACK_WAIT_S: Final = 300.0
"""So long a task is not given out again while the loop is held. It is also how long one waits that was being
done by a process that was killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DevStack(RunningStack):
    """A running stack whose agents are in this process."""

    served: ServedAgents
    watched: WatchedStack


@asynccontextmanager
async def dev_stack(
    config: StackConfig, stack_file: Path | None, clock: RestingClock, *, say: Callable[[str], None]
) -> AsyncIterator[DevStack]:
    """Start everything that ``config`` names in this process; take it all down at the end of the block.

    It runs on a :class:`~agentweave_bus.dev.rest.RestingLoop` of ``clock``. What happens to single agents is
    told to ``say``; one that can't be served keeps nobody else from it.

    Raises:
        ConfigurationError: a file or the grants are wrong, the agents can't live in one process, or the state
            directory is in use by another stack.
        BusError: the broker does not come up.

    """
    agents = plan_agents(config, ENVIRONMENT)
    watched = WatchedStack(config, agents, stack_file)
    watched.check_one_process()
    async with owned_tasks() as late:
        surroundings = Surroundings(
            time_ns=clock.time_ns,
            monotonic_ns=clock.monotonic_ns,
            new_client=partial(PatientClient, clock, late),
            on_wired=_Noted(clock).wired,
        )
        async with _served_stack(config, agents, watched, surroundings, say) as stack:
            yield stack
        late.cancel_scope.cancel()


@asynccontextmanager
async def _served_stack(
    config: StackConfig,
    agents: tuple[PlannedAgent, ...],
    watched: WatchedStack,
    surroundings: Surroundings,
    say: Callable[[str], None],
) -> AsyncIterator[DevStack]:
    began = time.monotonic()
    async with locked_stack(config, agents, surroundings=surroundings, patient=True) as (stack, lock):
        with client_files(config, stack) as files:
            plans = worker_plans(config, agents, stack, ENVIRONMENT)
            specs = [_patient(plan.spec, agent) for plan, agent in zip(plans, agents, strict=True)]
            os.environ.update(variables_of_all(specs))
            async with served_agents(
                specs, watched, environment=ENVIRONMENT, surroundings=surroundings, say=say
            ) as served:
                await served.start()
                await stack.settled()
                lock.workers = lambda: dict.fromkeys(served.serving, os.getpid())
                lock.note_workers()
                yield DevStack(
                    config=config,
                    agents=agents,
                    stack=stack,
                    clients=files,
                    overridden=overrides(agents),
                    seconds=time.monotonic() - began,
                    served=served,
                    watched=watched,
                )


def _patient(spec: WorkerSpec, agent: PlannedAgent) -> WorkerSpec:
    seconds = max(_ACK_WAIT_S, agent.config.bus.task_ack_wait)
    return replace(spec, environment={_ACK_WAIT: str(seconds), **spec.environment})


class _Noted:
    """Tells the clock of each call that somebody in this process makes, for as long as it waits for it."""

    def __init__(self, clock: RestingClock) -> None:
        self._clock = clock

    def wired(self, parts: object) -> None:
        assert isinstance(parts, Connected)
        parts.client.transport = _NotedTransport(parts.client.transport, self._clock)


class _NotedTransport:
    def __init__(self, transport: Transport, clock: RestingClock) -> None:
        self._transport = transport
        self._clock = clock

    async def call(self, request: Request) -> Answer:
        with self._clock.waiting():
            return await self._transport.call(request)
