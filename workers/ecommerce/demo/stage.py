"""The shop of the demo: the embedded stack, six worker processes, and clients that call."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agentweave_bus import AgentWeaveClient, SpiffeID, TaskResult
from agentweave_bus.config import RestartConfig, load_stack
from agentweave_bus.console import Console, open_console
from agentweave_bus.embedded.assembly import LocalStack, local_stack
from agentweave_bus.supervisor.worker_process import WorkerProcess
from workers.ecommerce.database import DATA_VARIABLE
from workers.ecommerce.directory import ADMIN, GATEWAY, TRUST_DOMAIN

__all__ = ["HOSTILE", "MISSED_AFTER_S", "PRINCIPAL", "Stage", "open_stage"]

STACK_FILE: Final = Path(__file__).parent.parent / "agentweave.yaml"
PRINCIPAL: Final = {"iss": "https://login.shop.example", "sub": "alice"}
HOSTILE: Final = SpiffeID.of(TRUST_DOMAIN, "demo", "hostile-broker")

MISSED_AFTER_S: Final = 1
"""After so many seconds without a word from a worker its task goes to another one; in service it is 30."""

_SECONDS: Final = 30.0
_LATE: Final = RestartConfig(first=60.0, longest=60.0)
"""A worker that is killed stays away until it is asked for, so that the demo can show what then is."""

_ACK_WAIT: Final = "AGENTWEAVE_BUS__TASK_ACK_WAIT"


@dataclass(slots=True)
class Stage:
    """The running shop."""

    local: LocalStack
    audit: Path
    grants: Path
    web: AgentWeaveClient
    operator: AgentWeaveClient
    console: Console

    @property
    def workers(self) -> dict[str, WorkerProcess]:
        """The process at every worker's place, by its name."""
        return {one.spec.name: one for one in self.local.workers.all}

    async def route(self, service: str, action: str, payload: Mapping[str, Any]) -> TaskResult:
        """Ask the gateway as the web shop does, for Alice."""
        request = {"service": service, "action": action, "payload": dict(payload)}
        return await self.web.call(GATEWAY, "route", request, principal=PRINCIPAL, timeout=_SECONDS)

    async def administer(self, action: str, payload: Mapping[str, Any]) -> TaskResult:
        """Ask the admin agent as an operator does."""
        return await self.operator.call(ADMIN, action, dict(payload), timeout=_SECONDS)

    async def kill(self, name: str) -> None:
        """Kill a worker, as a crash would, and wait until it is gone."""
        self.workers[name].kill()
        await self.workers[name].wait()

    async def restart(self, name: str) -> None:
        """Kill a worker, if it lives, and start it anew."""
        await self.kill(name)
        await self.local.workers.restart(name)


@asynccontextmanager
async def open_stage(state: Path, grants: Path | None = None) -> AsyncIterator[Stage]:
    """Start the shop with all its state in ``state``; with other ``grants`` than its own, if given."""
    config = load_stack(STACK_FILE)
    grants = grants or STACK_FILE.parent / "grants.yaml"
    agents = tuple(one.model_copy(update={"restart": _LATE}) for one in config.agents)
    config = config.model_copy(update={"state_dir": state, "grants": grants, "agents": agents})
    async with AsyncExitStack() as block:
        block.enter_context(_variables({DATA_VARIABLE: str(state / "data"), _ACK_WAIT: f"{MISSED_AFTER_S}"}))
        log = block.enter_context((state / "workers.log").open("w"))

        def keep(name: str, line: str) -> None:
            log.write(f"{name} | {line}\n")

        local = await block.enter_async_context(
            local_stack(config, keep, environment="production", unrestricted=(HOSTILE,))
        )
        web, operator = [
            await block.enter_async_context(AgentWeaveClient(_client_file(local, name)))
            for name in ("web", "operator")
        ]
        audit = state / "audit"
        console = await block.enter_async_context(
            open_console(operator=_client_file(local, "operator"), workers=local.workers.status, audit=audit)
        )
        yield Stage(local, audit, grants, web, operator, console)


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables: for the workers, and to look at what they stored."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _client_file(local: LocalStack, name: str) -> Path:
    return local.clients[SpiffeID.of(TRUST_DOMAIN, "client", name)]
