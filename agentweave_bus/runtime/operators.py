"""What operators do, from their own identity: work on the dead letters of a broker, through its control role.

    async with Operator("operator.yaml") as operator:
        for letter in (await operator.list())["letters"]:
            await operator.redrive(letter["letter"])

An operator is a client like any other, whom the grants' ``operators`` let do ``control:redrive``.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from agentweave_bus.config import AgentConfig, load_config
from agentweave_bus.envelope import control_role
from agentweave_bus.exceptions import AgentCallError, AgentWeaveError, ConfigurationError
from agentweave_bus.runtime.surroundings import REAL, Surroundings
from agentweave_bus.runtime.wiring import Connected, connected, server_id
from agentweave_bus.tasks.dead_letters import REDRIVE_ACT, LetterReference

__all__ = ["DeadLetterCalls", "Operator"]


class DeadLetterCalls:
    """Asks the control role about dead letters, as the identity of ``parts``.

    Each method raises:

        AuthorizationError: an own policy, or that of the control role, does not allow it.
        AgentCallError: it could not be done, or nobody answered; the message and subclasses say why.
        ConfigurationError: the reference names no dead letter, or one of an event is to be redriven.
    """

    def __init__(self, parts: Connected, *, timeout: float = 30.0) -> None:
        self._parts = parts
        self._timeout = timeout

    async def list(
        self,
        agent: str | None = None,
        *,
        limit: int = 50,
        after: str | None = None,
        all: bool = False,  # noqa: A002 - as the option is called
    ) -> dict[str, Any]:
        """Return dead letters (``letters``), and where to go on (``after``), ``None`` at the end.

        ``limit`` is 1 to 200. With ``all`` also those that were dropped or redriven are listed.
        """
        asked: dict[str, Any] = {"limit": limit, "all": all}
        asked |= {} if agent is None else {"agent": agent}
        return await self._ask("dlq_list", asked | ({} if after is None else {"after": after}))

    async def show(self, letter: str, *, payload: bool = False) -> dict[str, Any]:
        """Return all that is known of a dead letter; with ``payload`` what was asked for, too."""
        return await self._ask("dlq_show", {"letter": _checked(letter), "payload": payload})

    async def redrive(self, letter: str, *, deadline: float = 86_400.0) -> dict[str, Any]:
        """Have the task in a dead letter begin anew; ``deadline`` is in how many seconds at the latest.

        It is queued when this returns. Asked for twice it still runs once.
        """
        return await self._ask("dlq_redrive", {"letter": _checked(letter), "deadline": float(deadline)})

    async def drop(self, letter: str, *, reason: str = "") -> dict[str, Any]:
        """Put on record that a dead letter is dealt with, so that it is listed no more."""
        return await self._ask("dlq_drop", {"letter": _checked(letter), "reason": reason})

    async def _ask(self, capability: str, asked: dict[str, Any]) -> dict[str, Any]:
        control = control_role(server_id(self._parts.config).trust_domain)
        result = await self._parts.client.call(
            str(control), capability, asked, timeout=self._timeout, safe=True, action=REDRIVE_ACT
        )
        if result.status == "failed":
            if isinstance(result.data, dict) and (event := result.data.get("event")) is not None:
                raise ConfigurationError(result.error or "a dead event can't be redriven", hint=_again(event))
            raise AgentCallError(result.error or "the control role could not do it")
        if not isinstance(result.data, dict):
            raise AgentCallError(f"{control} answers with nothing that is understood")
        return result.data


class Operator:
    """Connects as an operator, for the length of its block; what is asked for is :class:`DeadLetterCalls`.

    ``config`` is a configuration, the path of one, or ``None`` for ``AGENTWEAVE_CONFIG``.
    """

    def __init__(
        self,
        config: AgentConfig | str | Path | None = None,
        *,
        connect_deadline_s: float = 10.0,
        surroundings: Surroundings = REAL,
        **options: Any,
    ) -> None:
        self.config = config if isinstance(config, AgentConfig) else load_config(config)
        self._connect_deadline_s = connect_deadline_s
        self._surroundings = surroundings
        self._options = options
        self._stack: AsyncExitStack | None = None

    async def __aenter__(self) -> DeadLetterCalls:
        """Connect; raises as ``AgentWeaveClient`` does."""
        if self._stack is not None:
            raise AgentWeaveError("this operator is in use already; make another one")
        self._stack = AsyncExitStack()
        parts = await self._stack.enter_async_context(
            connected(
                self.config,
                connect_deadline_s=self._connect_deadline_s,
                surroundings=self._surroundings,
                **self._options,
            )
        )
        return DeadLetterCalls(parts)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            await stack.__aexit__(kind, error, trace)


def _again(event: object) -> str:
    return (
        f"What it held: agentweave dlq show LETTER --payload. As its publisher: agentweave publish {event}"
        " --data JSON. When that is done: agentweave dlq drop LETTER."
    )


def _checked(letter: str) -> str:
    return str(LetterReference.parse(letter))
