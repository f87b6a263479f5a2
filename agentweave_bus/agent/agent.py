"""Agents as people write them: :class:`SecureAgent` for service, :class:`BaseAgent` for plain logic.

A :class:`SecureAgent` knows its configuration and its capabilities. It opens no socket and holds no key:
what connects it (identity, bus, policy, audit) is put together above this layer by an
:class:`AgentRunner`, which hands the agent an :class:`AgentRuntime` for as long as it runs. There is no
way to send or to be reached without one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from agentweave_bus.agent.context import RequestContext, bind_context, find_context
from agentweave_bus.agent.lifecycle import HEALTH, AgentLifecycle, call_hook
from agentweave_bus.config import AgentConfig, load_config
from agentweave_bus.exceptions import AgentWeaveError, CallTimeoutError, ConfigurationError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.publishing import DEFAULT_EVENT_SECONDS, PublishedEvent
from agentweave_bus.types import JsonValue, TaskResult

if TYPE_CHECKING:
    from agentweave_bus.authz.provider import AuthorizationProvider
    from agentweave_bus.identity import IdentityProvider, X509Svid
    from agentweave_bus.tasks.handle import TaskHandle
    from agentweave_bus.tasks.retry import Retry

__all__ = [
    "DEFAULT_CALL_TIMEOUT",
    "AgentRunner",
    "AgentRuntime",
    "BaseAgent",
    "SecureAgent",
    "install_runner",
]

DEFAULT_CALL_TIMEOUT: Final = 30.0  # seconds


class AgentRuntime(Protocol):
    """What a running agent is connected to."""

    @property
    def spiffe_id(self) -> SpiffeID:
        """The identity that the agent's SVID proves."""

    async def call(
        self,
        target: str,
        capability: str,
        payload: Any,
        *,
        timeout: float,  # noqa: ASYNC109 - it travels in the envelope, too
        context: RequestContext | None,
        principal: Mapping[str, Any] | None,
        scope: Sequence[str] | None,
    ) -> TaskResult:
        """Call ``capability`` of ``target``; see :meth:`SecureAgent.call_agent`."""

    async def submit(
        self,
        target: str,
        capability: str,
        payload: Any,
        *,
        context: RequestContext | None,
        idempotency_key: str | None,
        deadline: float | None,
        delay: float | None,
        at: datetime | None,
        every: str | None,
        priority: int | None,
        retry: Retry | None,
        principal: Mapping[str, Any] | None,
        scope: Sequence[str] | None,
    ) -> TaskHandle:
        """Have a task stored for ``target``; see :meth:`SecureAgent.submit_agent`."""

    async def publish(
        self,
        name: str,
        data: Any,
        *,
        key: str | None,
        deadline: float,
        context: RequestContext | None,
    ) -> PublishedEvent:
        """Publish an event; see :meth:`SecureAgent.publish`."""


class AgentRunner(Protocol):
    """What connects an agent and serves it until it is cancelled or the process is told to stop."""

    async def run(self, agent: SecureAgent) -> None:
        """Serve ``agent``: ``begin_serving()``, then its requests, then ``end_serving()``."""


class _Hook:
    runner: AgentRunner | None = None


def install_runner(runner: AgentRunner) -> None:
    """Make ``runner`` the one that :meth:`SecureAgent.run` uses. Importing the package does this."""
    _Hook.runner = runner


class BaseAgent(AgentLifecycle):
    """An agent without any security, for tests of plain logic: nothing can reach it but this process.

    ``async with MyAgent() as agent`` runs the hooks; ``await agent.invoke("name", {...})`` validates
    arguments and answers as in service. No caller is authenticated and no policy asked.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name or type(self).__name__)
        self.capability_table  # noqa: B018 - found wrong here, not at the first call
        self.event_handlers  # noqa: B018

    async def invoke(
        self, name: str, payload: JsonValue = None, *, context: RequestContext | None = None
    ) -> TaskResult:
        """Run the capability ``name`` with ``payload`` (an object with its arguments).

        ``context`` is what the handler sees as its request.

        Raises:
            PayloadError: there is no such capability, or it takes other arguments.

        """
        bound = self.capability_table.resolve(name)
        call = bound.validate({} if payload is None else payload)
        if context is None:
            return await bound.invoke(call)
        with bind_context(context):
            return await bound.invoke(call)

    async def __aenter__(self) -> Self:
        await call_hook(self.on_start())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await call_hook(self.on_stop())


class SecureAgent(AgentLifecycle):
    """An agent that is reached, and reaches others, only by signed, verified and authorized requests.

    Subclass it, decorate methods with ``@capability``, and ``await agent.run()``. ``config`` is kept as
    an attribute. ``authz_provider``
    replaces the policy engine and ``identity_provider`` where the SVID comes from; neither turns a check
    off. The constructor does no I/O.

    Raises:
        ConfigurationError: no configuration is given, the capabilities that it lists are not those of
            the class, or a handler can't be served.

    """

    def __init__(
        self,
        config: AgentConfig | None = None,
        *,
        authz_provider: AuthorizationProvider | None = None,
        identity_provider: IdentityProvider | None = None,
    ) -> None:
        if not isinstance(config, AgentConfig):
            raise ConfigurationError(
                f"{type(self).__name__} needs its configuration, not {type(config).__name__}.",
                hint=f"Use {type(self).__name__}.from_config(path), or pass an AgentConfig.",
            )
        super().__init__(config.agent.name)
        self.config = config
        self.authz_provider = authz_provider
        self.identity_provider = identity_provider
        self.__spiffe_id = config.agent.spiffe_id
        self.__listed = config.agent.capabilities
        self.__runtime: AgentRuntime | None = None
        self._check_class()

    @classmethod
    def from_config(cls, path: str | Path | None = None) -> Self:
        """Load the configuration at ``path`` (or ``AGENTWEAVE_CONFIG``) and return ``cls(config)``.

        Raises:
            ConfigurationError: the configuration is wrong; the message says where and the way out.

        """
        return cls(load_config(path))

    @property
    def spiffe_id(self) -> SpiffeID:
        """The agent's SPIFFE ID: the SVID's while it runs, before that the configured one."""
        return self.__spiffe_id if self.__runtime is None else self.__runtime.spiffe_id

    async def run(self) -> None:
        """Serve until cancelled, or until SIGINT or SIGTERM.

        Raises:
            ConfigurationError: see the class; also when nothing is installed that could run an agent.
            AgentWeaveError: identity, policy, audit log or broker are not to be had.

        """
        self._check_capabilities()
        if _Hook.runner is None:
            raise ConfigurationError(
                "Nothing is installed that could run an agent.", hint="Import agentweave_bus first."
            )
        await _Hook.runner.run(self)

    async def call_agent(
        self,
        target: str,
        task_type: str,
        payload: Any,
        timeout: float = DEFAULT_CALL_TIMEOUT,  # noqa: ASYNC109 - it travels in the envelope, too
        *,
        principal: Mapping[str, Any] | None = None,
        scope: Sequence[str] | None = None,
    ) -> TaskResult:
        """Ask the agent ``target`` (a SPIFFE ID) for its capability ``task_type``.

        Inside a capability the request that is being handled travels along, as proof for whom this one
        is made, and ``timeout`` (seconds) is cut to what its caller still waits. ``principal`` names for
        whom this agent acts, as an origin; ``scope`` lists the ``<SPIFFE ID>#<capability>`` pairs that
        this call and what follows from it may reach.

        A failure of the capability itself is a result with status ``failed``.

        Raises:
            AgentCallError: the call ended without a result; subclasses say why.
            AgentWeaveError: the agent is not running, or names a principal inside a request.

        """
        runtime = self.__runtime
        if runtime is None:
            raise AgentWeaveError(
                f"agent {self.name!r} is not running, so it can't call: call from a capability or from"
                " on_start, while run() is serving"
            )
        context = find_context()
        if context is not None and principal is not None:
            raise AgentWeaveError("only the origin of a request names a principal")
        return await runtime.call(
            str(target),
            task_type,
            payload,
            timeout=_time_for_call(timeout, context),
            context=context,
            principal=principal,
            scope=scope,
        )

    async def submit_agent(
        self,
        target: str,
        task_type: str,
        payload: Any,
        *,
        idempotency_key: str | None = None,
        deadline: float | None = None,
        delay: float | None = None,
        at: datetime | None = None,
        every: str | None = None,
        priority: int | None = None,
        retry: Retry | None = None,
        principal: Mapping[str, Any] | None = None,
        scope: Sequence[str] | None = None,
    ) -> TaskHandle:
        """Have a durable task stored for the agent ``target``; it is accepted when this returns.

        Inside a capability the request that is being handled travels along, as proof for whom this one is
        made; the task may outlive it. It is due now, in ``delay`` seconds or ``at`` a time; ``deadline``
        (seconds from then, a day without it) is until when it may be begun; ``every`` lets it come again, and
        ``priority`` (0 to 9) goes before or behind others: see ``AgentWeaveClient.submit``. With an
        ``idempotency_key`` a second submission is the same task: give one wherever a handler may run again.
        ``retry`` may ask for fewer attempts and longer waits than the capability has; ``principal`` and
        ``scope`` are as of :meth:`call_agent`.

        Raises:
            AgentCallError: it was not stored (with ``CallTimeoutError``: perhaps not); subclasses say why.
            AgentWeaveError: the agent is not running, or names a principal inside a request.

        """
        runtime = self.__runtime
        if runtime is None:
            raise AgentWeaveError(f"agent {self.name!r} is not running, so it can't submit tasks")
        context = find_context()
        if context is not None and principal is not None:
            raise AgentWeaveError("only the origin of a request names a principal")
        return await runtime.submit(
            str(target),
            task_type,
            payload,
            context=context,
            idempotency_key=idempotency_key,
            deadline=deadline,
            delay=delay,
            at=at,
            every=every,
            priority=priority,
            retry=retry,
            principal=principal,
            scope=scope,
        )

    async def publish(
        self,
        name: str,
        data: Any = None,
        *,
        key: str | None = None,
        deadline: float = DEFAULT_EVENT_SECONDS,
    ) -> PublishedEvent:
        """Publish an event for whoever may receive it; it is stored when this returns.

        Inside a handler the request that is being handled travels along, as proof of what it follows from.
        ``data`` is an object with what handlers take, ``key`` says what it is about, in their
        ``context.key``, and ``deadline`` (seconds from now) is until when it is handled.

        Raises:
            AgentCallError: it was not stored (with ``CallTimeoutError``: perhaps not); subclasses say why.
            AgentWeaveError: the agent is not running.

        """
        runtime = self.__runtime
        if runtime is None:
            raise AgentWeaveError(
                f"agent {self.name!r} is not running, so it can't publish: publish from a handler or from"
                " on_start, while run() is serving"
            )
        return await runtime.publish(name, data, key=key, deadline=deadline, context=find_context())

    # --- for the runner -----------------------------------------------------------------------------

    async def begin_serving(self, runtime: AgentRuntime) -> None:
        """Connect the agent to ``runtime`` and run ``on_start``; its exception disconnects again."""
        self.__runtime = runtime
        try:
            await call_hook(self.on_start())
        except BaseException:
            self.__runtime = None
            raise

    async def end_serving(self) -> None:
        """Run ``on_stop`` (an exception there is logged) and disconnect."""
        try:
            await call_hook(self.on_stop())
        except Exception:
            self.logger.exception("on_stop failed")
        finally:
            self.__runtime = None

    async def announce_svid(self, new_svid: X509Svid) -> None:
        """Run ``on_svid_update``; an exception there is logged, for the new SVID is in use already."""
        try:
            await call_hook(self.on_svid_update(new_svid))
        except Exception:
            self.logger.exception("on_svid_update failed")

    def _check_class(self) -> None:
        self._check_capabilities()

    def _check_capabilities(self) -> None:
        """Compare what the configuration lists, if it lists any, with what is decorated."""
        listed = self.__listed
        decorated = set(self.capability_table)
        self.event_handlers  # noqa: B018 - found wrong here, not at the first event
        if listed is None:
            return
        names = {entry.name for entry in listed}
        if HEALTH not in names:
            decorated.discard(HEALTH)  # every agent answers it; listing it is free
        if names != decorated:
            raise ConfigurationError(
                f"agent.capabilities differs from what {type(self).__name__} declares:"
                f" {_difference(names, decorated)}.",
                key="agent.capabilities",
                hint="Make the two equal, or remove the list.",
            )


def _difference(listed: set[str], decorated: set[str]) -> str:
    parts = [
        (listed - decorated, "listed but not declared: "),
        (decorated - listed, "declared but not listed: "),
    ]
    return "; ".join(text + ", ".join(sorted(names)) for names, text in parts if names)


def _time_for_call(timeout: float, context: RequestContext | None) -> float:
    if not _is_seconds(timeout):
        raise ConfigurationError(f"A timeout must be a positive number of seconds, not {timeout!r}.")
    remaining = math.inf if context is None else context.remaining()
    if remaining <= 0:
        raise CallTimeoutError("the request that this call serves has no time left")
    return min(float(timeout), remaining)


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
