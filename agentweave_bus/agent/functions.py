"""The second door: an :class:`Agent` object whose capabilities are plain functions.

The machinery is that of :class:`~agentweave_bus.agent.agent.SecureAgent`; only the way of writing differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from agentweave_bus.agent.agent import DEFAULT_CALL_TIMEOUT, AgentRuntime, SecureAgent
from agentweave_bus.agent.capability import capability, marks_of
from agentweave_bus.agent.dispatch import CapabilityTable
from agentweave_bus.config import AgentConfig, load_config
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.types import TaskResult

if TYPE_CHECKING:
    from agentweave_bus.authz.provider import AuthorizationProvider
    from agentweave_bus.identity import IdentityProvider

__all__ = ["Agent"]

F = TypeVar("F", bound=Callable[..., Any])


class Agent(SecureAgent):
    """An agent of plain functions.

    For example::

        agent = Agent("pricing", trust_domain="acme-corp.io")

        @agent.capability("quote", safe=True)
        async def quote(item: str, quantity: int = 1) -> dict[str, str]: ...

    The first argument is an ``AgentConfig``, which does no I/O, or the agent's name. With a name the rest
    comes from ``config`` (a path or an ``AgentConfig``), else from ``AGENTWEAVE_CONFIG`` and the
    environment; ``trust_domain`` beats both. A handler finds its request with ``current_context()``.

    Raises:
        ConfigurationError: the configuration is wrong, or is another agent's.

    """

    def __init__(
        self,
        name: str | AgentConfig | None = None,
        *,
        trust_domain: str | None = None,
        config: str | Path | AgentConfig | None = None,
        authz_provider: AuthorizationProvider | None = None,
        identity_provider: IdentityProvider | None = None,
    ) -> None:
        self.__functions: list[Callable[..., Any]] = []
        self.__frozen = False
        super().__init__(
            _configuration(name, trust_domain, config),
            authz_provider=authz_provider,
            identity_provider=identity_provider,
        )

    def capability(
        self,
        name: str,
        *,
        safe: bool = False,
        description: str | None = None,
        timeout: float | None = None,
        concurrency: int | None = None,
        retry: Retry | None = None,
    ) -> Callable[[F], F]:
        """Make a function answer requests for ``name``; see :func:`agentweave_bus.capability`.

        Raises:
            ConfigurationError: the name is malformed, or already another function's.

        """
        mark = capability(
            name,
            safe=safe,
            description=description,
            timeout=timeout,
            concurrency=concurrency,
            retry=retry,
        )

        def register(function: F) -> F:
            self._refuse_second(name, function)
            self.__functions.append(mark(function))
            self._forget_capabilities()  # collected again when they are next looked at
            return function

        return register

    async def begin_serving(self, runtime: AgentRuntime) -> None:
        """Connect the agent; functions that register from now on are refused."""
        self.__frozen = True
        await super().begin_serving(runtime)

    async def call(
        self,
        target: str,
        task_type: str,
        payload: Any,
        timeout: float = DEFAULT_CALL_TIMEOUT,  # noqa: ASYNC109 - it travels in the envelope, too
        *,
        principal: Mapping[str, Any] | None = None,
        scope: Sequence[str] | None = None,
    ) -> TaskResult:
        """Ask another agent; the same as :meth:`SecureAgent.call_agent`."""
        return await self.call_agent(target, task_type, payload, timeout, principal=principal, scope=scope)

    def _collect_capabilities(self, table: CapabilityTable) -> None:
        super()._collect_capabilities(table)
        for function in self.__functions:
            table.add_function(function)

    def _check_class(self) -> None:
        """Leave the comparison to ``run()``: the functions come after the constructor."""

    def _check_capabilities(self) -> None:
        self._forget_capabilities()  # decorators above @agent.capability have spoken since
        super()._check_capabilities()

    def _refuse_second(self, name: str, function: Callable[..., Any]) -> None:
        if self.__frozen:
            raise ConfigurationError(f"Agent {self.name!r} is running; {name!r} comes too late.")
        for other in self.__functions:
            marks = marks_of(other)
            if marks and marks.spec and marks.spec.name == name:
                raise ConfigurationError(
                    f"Capability {name!r} is declared twice: by {other.__qualname__}"
                    f" and by {function.__qualname__}.",
                    hint="Rename one.",
                )


def _configuration(
    name: str | AgentConfig | None, trust_domain: str | None, config: str | Path | AgentConfig | None
) -> AgentConfig | None:
    if isinstance(name, AgentConfig):
        name, config = None, name
    if isinstance(config, AgentConfig):
        _refuse_other(config, name=name, trust_domain=trust_domain)
        return config
    given = {"agent.name": name, "agent.trust_domain": trust_domain}
    return load_config(config, overrides={key: value for key, value in given.items() if value is not None})


def _refuse_other(config: AgentConfig, **given: str | None) -> None:
    for key, value in given.items():
        configured = getattr(config.agent, key)
        if value not in (None, configured):
            raise ConfigurationError(
                f"The configuration is that of {configured!r}, not of {value!r}.",
                key=f"agent.{key}",
                hint="Leave it out here, or load another configuration.",
            )
