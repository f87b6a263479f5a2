"""Opening a console: its feeds, its page and its address, in the process and on the loop of whoever asks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from agentweave_bus import __version__
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.config import AgentConfig, load_config
from agentweave_bus.config.security import is_loopback
from agentweave_bus.console.acts import Acts
from agentweave_bus.console.broker_feed import BrokerCalls, BrokerFeed, Connect
from agentweave_bus.console.decisions_feed import DecisionsFeed
from agentweave_bus.console.feeding import feeding
from agentweave_bus.console.guard import COOKIE, Sessions
from agentweave_bus.console.listening import LOOPBACK, bind, names_of, serving
from agentweave_bus.console.lookup import Lookup
from agentweave_bus.console.model import ConsoleModel
from agentweave_bus.console.server import console_app
from agentweave_bus.console.streaming import LiveState
from agentweave_bus.console.watched import Watched
from agentweave_bus.console.workers_feed import WorkersFeed, WorkersSource
from agentweave_bus.envelope import control_role
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.runtime.operators import Operator

__all__ = ["Console", "open_console"]


@dataclass(frozen=True, slots=True)
class Console:
    """A console that is open."""

    address: str
    """Where it is, without a token: for browsers that have a session."""
    sessions: Sessions

    @property
    def url(self) -> str:
        """The address that opens it once. After it was used this is another one."""
        return f"{self.address}?token={self.sessions.token}"


@asynccontextmanager
async def open_console(
    *,
    operator: AgentConfig | str | Path | None,
    workers: WorkersSource | None = None,
    audit: Path | Sequence[Path] = (),
    host: str = LOOPBACK,
    port: int = 0,
    plain_http: bool = False,
    actions: bool = False,
    on_url: Callable[[str], None] = lambda _url: None,
    connect: Connect | None = None,
) -> AsyncIterator[Console]:
    """Serve a console for the length of the block.

    ``operator`` is the configuration as whom it asks the control role, ``workers`` the supervisor's socket or
    what returns its status here, ``audit`` the directories of audit logs. A source that does not answer keeps
    nobody from opening it: the page says so. ``on_url`` is called with each address that opens it, the first
    before this returns. ``connect`` is how to reach the control role, by default as ``operator``. With
    ``actions`` its page can do what the operator may.

    Raises:
        ConfigurationError: it can't listen there; or ``host`` is not this machine's alone, which wants
            ``plain_http``, since what is shown is not encrypted on its way.

    """
    if not is_loopback(host) and not plain_http:
        raise ConfigurationError(
            f"{host} can be reached from other machines, and the console speaks plain HTTP.",
            key="--host",
            hint="Use loopback and an ssh tunnel, or say --plain-http.",
        )
    config = operator if isinstance(operator, AgentConfig) else load_config(operator)
    me = config.agent.spiffe_id
    listener = bind(host, port)
    port = listener.getsockname()[1]
    address, hosts = names_of(host, port)
    sessions = Sessions(lambda token: on_url(f"{address}?token={token}"))
    watched = Watched()
    model = ConsoleModel(trust_domain=me.trust_domain, clock_ms=_clock_ms)
    fixed = {
        "as": str(me),
        "trust_domain": me.trust_domain,
        "actions": actions,
        "version": __version__,
        **({"csrf": sessions.act_value} if actions else {}),
    }
    state = LiveState(model.sections, fixed, watched, _clock_ms)
    control = str(control_role(me.trust_domain))
    broker = BrokerFeed(model, connect or partial(_connected, config), watched, me=str(me), control=control)
    logs = (audit,) if isinstance(audit, Path) else tuple(audit)
    further = [*Lookup(model, broker, logs).routes(), *(Acts(broker).routes() if actions else ())]
    app = console_app(
        model,
        state,
        watched,
        sessions=sessions,
        hosts=hosts,
        cookie=f"{COOKIE}_{port}",
        further=further,
    )
    feeds = {
        "broker": broker.run,
        "workers": WorkersFeed(model, workers, watched).run,
        "decisions": DecisionsFeed(model, logs, watched).run,
    }
    async with serving(app, listener, state.close), owned_tasks() as group:
        group.start_soon(state.run)
        for source, run in feeds.items():
            group.start_soon(feeding, model, source, run)
        try:
            yield Console(address, sessions)
        finally:
            group.cancel_scope.cancel()


@asynccontextmanager
async def _connected(config: AgentConfig) -> AsyncIterator[BrokerCalls]:
    async with Operator(config) as calls:
        yield calls


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000
