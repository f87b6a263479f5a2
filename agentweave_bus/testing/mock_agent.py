"""An agent's handlers without a bus: real arguments, real policy where one is given, no network.

:class:`MockSecureAgent` puts one payload after another through what stands between a verified call and a
handler: the capability's peer restrictions, validation, the policy, the request's context, and the conversion
of the result, as they are in service. What comes before that (signatures, delegation, replay) is not there;
the fixture ``bus`` has it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from agentweave_bus.agent import Agent, RequestContext, SecureAgent, bind_context, to_result
from agentweave_bus.authz import Authorizer, AuthzContext
from agentweave_bus.bus.subjects import event_subject
from agentweave_bus.config import AgentConfig
from agentweave_bus.envelope import decode_payload, encode_payload, new_id
from agentweave_bus.exceptions import AgentCallError, AgentWeaveError, AuthorizationError, TaskFailedError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.publishing import PublishedEvent
from agentweave_bus.testing.configuration import agent_config
from agentweave_bus.testing.policies import PolicySource, load_policy_source
from agentweave_bus.testing.trust import DEFAULT_TRUST_DOMAIN
from agentweave_bus.types import TaskResult

__all__ = ["MockCall", "MockEvent", "MockSecureAgent"]

_ID: Final = f"spiffe://{DEFAULT_TRUST_DOMAIN}/agent/test"


@dataclass(frozen=True, slots=True)
class MockCall:
    """A call that the agent under test made."""

    target: str
    capability: str
    payload: Any


@dataclass(frozen=True, slots=True)
class MockEvent:
    """An event that the agent under test published."""

    name: str
    data: Any
    key: str | None


class MockSecureAgent:
    """The handlers of ``agent`` (a class or an object), reachable from this process only.

    ``await mock.greet({"who": "Ada"})`` puts a payload to the capability ``greet`` and returns the result's
    data; :meth:`invoke` returns the whole result. A capability that the agent does not declare is an
    ``AttributeError``: nothing succeeds that was not written. Without ``agent`` they are declared here, by
    :meth:`capability`.

    ``spiffe_id`` is the agent's identity (by default an object's own), ``caller`` who asks. With ``policy``
    (see ``testing.policies.PolicySource``) each call is decided by it, incoming and outgoing; without one
    nobody is asked. Calls that the agent makes are kept in ``calls`` and answered as :meth:`answers` says.
    There are no queues: submitting a durable task is an ``AgentCallError``.
    """

    def __init__(
        self,
        agent: type[SecureAgent] | SecureAgent | None = None,
        *,
        spiffe_id: str | None = None,
        caller: str = f"spiffe://{DEFAULT_TRUST_DOMAIN}/client/test",
        policy: PolicySource | None = None,
        policy_path: str | None = None,
    ) -> None:
        self.agent = _made(agent, spiffe_id)
        self.caller = SpiffeID(caller)
        self.calls: list[MockCall] = []
        self.published: list[MockEvent] = []
        self._authorizer: Authorizer | None = None
        if policy is not None:
            self._authorizer = load_policy_source(policy, policy_path).authorizer()
        self._answers: dict[tuple[str, str], Any] = {}
        self._started = False

    @property
    def spiffe_id(self) -> SpiffeID:
        """The agent's identity."""
        return self.agent.spiffe_id

    def capability(self, name: str, **options: Any) -> Callable[[Any], Any]:
        """Declare a capability, as ``@agent.capability`` of an ``Agent`` object does.

        Raises:
            AgentWeaveError: the agent under test is a class's, whose capabilities are its methods.

        """
        if not isinstance(self.agent, Agent):
            raise AgentWeaveError(f"the capabilities of {type(self.agent).__name__} are its methods")
        return self.agent.capability(name, **options)

    def answers(self, target: str, capability: str, answer: Any) -> None:
        """Say what ``target`` answers when the agent asks it for ``capability``.

        ``answer`` is a value, a ``TaskResult``, an exception to raise, or a function of the payload that
        returns one of these. What no answer is declared for is an ``AgentCallError``.
        """
        self._answers[str(SpiffeID(target)), capability] = answer

    async def invoke(
        self,
        capability: str,
        payload: Any = None,
        *,
        caller: str | None = None,
        principal: Mapping[str, str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - it becomes the request's deadline
    ) -> TaskResult:
        """Put ``payload`` to ``capability`` and return the result as its caller would get it.

        Raises:
            AttributeError: the agent declares no such capability.
            PayloadError: it takes other arguments, or the payload is no JSON value.
            AuthorizationError: a restriction of the capability or the policy does not let this caller.

        """
        await self._start()
        bound = self.agent.capability_table.get(capability)
        if bound is None:
            raise AttributeError(self._undeclared(capability))
        asks = self.caller if caller is None else SpiffeID(caller)
        if (reason := bound.admits_peer(asks)) is not None:
            raise AuthorizationError(f"{self.spiffe_id} denied {capability!r}: {reason}", reason=reason)
        call = bound.validate(decode_payload(encode_payload({} if payload is None else payload)))
        context = _context(asks, principal, timeout)
        await self._authorize(
            AuthzContext(
                caller=asks,
                callee=self.spiffe_id,
                action=capability,
                direction="inbound",
                payload=call.policy_payload,
                principal=principal,
            )
        )
        with bind_context(context):
            result = await bound.invoke(call)
        return TaskResult.from_json(decode_payload(encode_payload(result.to_json())))

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        """Return what asks for the capability ``name``; ``_`` may stand for ``-``."""
        if name.startswith("_") or name == "agent":
            raise AttributeError(name)
        for candidate in (name, name.replace("_", "-")):
            if candidate in self.agent.capability_table:
                return _Asked(self, candidate)
        raise AttributeError(self._undeclared(name))

    async def __aenter__(self) -> Self:
        await self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.agent.end_serving()
        self._started = False

    async def _start(self) -> None:
        if not self._started:
            self._started = True
            await self.agent.begin_serving(_Runtime(self))

    def _undeclared(self, name: str) -> str:
        known = ", ".join(self.agent.capability_table)
        return f"the agent {self.agent.name} declares no capability {name!r}; it has {known}"

    async def _authorize(self, facts: AuthzContext) -> None:
        if self._authorizer is None:
            return
        decision = await self._authorizer.authorize(facts)
        if not decision.allowed:
            raise AuthorizationError(
                f"{facts.action!r} of {facts.callee} by {facts.caller} is not allowed: {decision.reason}",
                reason=decision.reason,
                direction=facts.direction,
            )

    def take_event(self, name: str, data: Any, key: str | None) -> PublishedEvent:
        """Take note of an event that the agent publishes. For its runtime."""
        value = decode_payload(encode_payload({} if data is None else data))
        event_subject(self.spiffe_id, name)  # refuses what is no event's name
        self.published.append(MockEvent(name, value, key))
        return PublishedEvent(name, new_id(time.time_ns() // 1_000_000), "")

    async def answer(self, target: SpiffeID, capability: str, payload: Any) -> TaskResult:
        """Answer a call that the agent makes. For its runtime."""
        value = decode_payload(encode_payload({} if payload is None else payload))
        await self._authorize(
            AuthzContext(
                caller=self.spiffe_id, callee=target, action=capability, direction="outbound", payload=value
            )
        )
        self.calls.append(MockCall(str(target), capability, value))
        try:
            found = self._answers[str(target), capability]
        except KeyError:
            raise AgentCallError(
                f"the test declares no answer of {target} to {capability!r}: use answers()"
            ) from None
        found = found(value) if callable(found) and not isinstance(found, type) else found
        if isinstance(found, BaseException):
            raise found
        return TaskResult.from_json(decode_payload(encode_payload(to_result(found).to_json())))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What ``mock.greet`` is."""

    mock: MockSecureAgent
    name: str

    async def __call__(self, payload: Any = None, /, **arguments: Any) -> Any:
        """Ask, with a payload or with its members, and return the data. A failed result raises."""
        result = await self.mock.invoke(self.name, arguments if payload is None else payload)
        if result.status == "failed":
            raise TaskFailedError(result.error or "failed")
        return result.data


class _Runtime:
    """What the agent under test is connected to; see ``agent.AgentRuntime``."""

    def __init__(self, mock: MockSecureAgent) -> None:
        self._mock = mock
        self._spiffe_id = mock.agent.config.agent.spiffe_id

    @property
    def spiffe_id(self) -> SpiffeID:
        return self._spiffe_id

    async def call(
        self,
        target: str,
        capability: str,
        payload: Any,
        *,
        timeout: float,  # noqa: ASYNC109, ARG002 - the protocol's; nothing is waited for
        context: RequestContext | None,  # noqa: ARG002
        principal: Mapping[str, Any] | None,  # noqa: ARG002
        scope: Sequence[str] | None,  # noqa: ARG002
    ) -> TaskResult:
        return await self._mock.answer(SpiffeID(target), capability, payload)

    async def publish(
        self,
        name: str,
        data: Any,
        *,
        key: str | None,
        deadline: float,  # noqa: ARG002 - the protocol's; nothing is kept
        context: RequestContext | None,  # noqa: ARG002
    ) -> PublishedEvent:
        return self._mock.take_event(name, data, key)

    async def submit(self, target: str, capability: str, payload: Any, **_options: Any) -> Any:  # noqa: ARG002
        raise AgentCallError(
            f"a mock agent has no queues: test on the fixture bus what submits {capability!r} to {target}"
        )


def _made(agent: type[SecureAgent] | SecureAgent | None, spiffe_id: str | None) -> SecureAgent:
    if isinstance(agent, SecureAgent):
        if spiffe_id is not None and agent.spiffe_id != spiffe_id:
            raise AgentWeaveError(f"the agent is {agent.spiffe_id} already, not {spiffe_id}")
        return agent
    config: AgentConfig = agent_config(None, SpiffeID(spiffe_id or _ID), lambda _identity: {})
    return Agent(config) if agent is None else agent(config)


def _context(caller: SpiffeID, principal: Mapping[str, str] | None, timeout: float | None) -> RequestContext:
    now_ms = time.time_ns() // 1_000_000
    return RequestContext(
        caller_spiffe_id=str(caller),
        task_id=new_id(now_ms),
        deadline_ms=None if timeout is None else now_ms + int(timeout * 1000),
        principal=principal,
    )
