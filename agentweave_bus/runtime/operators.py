"""What operators do, from their own identity, through the control role of a broker.

They work on dead letters, and see how the tasks of all agents go:

    async with Operator("operator.yaml") as operator:
        for letter in (await operator.list())["letters"]:
            await operator.redrive(letter["letter"])
        page = await operator.observe_records()

An operator is a client like any other, whom the grants' ``operators`` let do ``control:redrive``, or
``control:observe``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from agentweave_bus.config import AgentConfig, load_config
from agentweave_bus.envelope import control_role
from agentweave_bus.exceptions import (
    AgentCallError,
    AgentWeaveError,
    BusError,
    CallRefusedError,
    CallTimeoutError,
    ConfigurationError,
    UnreachableError,
)
from agentweave_bus.runtime.surroundings import REAL, Surroundings
from agentweave_bus.runtime.wiring import Connected, connected, server_id
from agentweave_bus.tasks.dead_letters import LetterReference
from agentweave_bus.tasks.handle import TaskHandle
from agentweave_bus.tasks.operator_acts import OPERATOR_CAPABILITIES, WATCHING
from agentweave_bus.tasks.record import TaskRef
from agentweave_bus.tasks.status import TaskStatus
from agentweave_bus.types import TaskState

__all__ = ["DeadLetterCalls", "Operator", "OperatorCalls"]

_log = logging.getLogger(__name__)

_REPEAT_S: Final = 1.0
_LOOK_S: Final = 0.3


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
            str(control),
            capability,
            asked,
            timeout=self._timeout,
            safe=True,
            action=OPERATOR_CAPABILITIES[capability],
            watching=capability in WATCHING,
        )
        if result.status == "failed":
            if isinstance(result.data, dict) and (event := result.data.get("event")) is not None:
                raise ConfigurationError(result.error or "a dead event can't be redriven", hint=_again(event))
            raise AgentCallError(result.error or "the control role could not do it")
        if not isinstance(result.data, dict):
            raise AgentCallError(f"{control} answers with nothing that is understood")
        return result.data


class OperatorCalls(DeadLetterCalls):
    """All that operators may ask the control role; for these methods they need ``control:observe``.

    They raise as those of :class:`DeadLetterCalls`, and ConfigurationError for what can't be asked.
    """

    async def observe_queues(self) -> dict[str, Any]:
        """Return how many tasks wait where, by the broker's word.

        ``queues``: of each agent and capability how many are ``pending``, ``in_flight`` and ``redelivered``,
        and how many workers wait for one (``workers_waiting``). ``parked``: of each agent how many wait for
        their time (``waiting``). ``letters``: of each how many dead letters nobody has dropped (``count``).
        """
        return await self._ask("observe_queues", {})

    async def observe_records(
        self, after: Mapping[str, int] | None = None, *, limit: int = 100
    ) -> dict[str, Any]:
        """Return what agents recorded of their tasks (``records``), where to go on, and if there is ``more``.

        ``after`` is that of the answer before; without it each agent's are told from near the end on.
        ``limit`` is 1 to 200. Times are milliseconds since the epoch. A record that is not ``genuine`` has
        but ``agent``, ``at`` and ``why``.
        """
        asked = {} if after is None else {"after": dict(after)}
        return await self._ask("observe_records", {"limit": limit, **asked})

    async def observe_task(self, agent: str, sender: str, key: str) -> dict[str, Any]:
        """Return all ``records`` of one task, its ``steps``, and the last of its ``progress``.

        ``key`` is as records have it: 64 hexadecimal digits.
        """
        return await self._ask("observe_task", {"agent": agent, "sender": sender, "key": key})

    @property
    def connected(self) -> bool:
        """Whether there is a connection to the broker now; it is looked for as long as there is none."""
        return self._parts.keeper.connected

    async def cancel(self, reference: str, reason: str = "", *, timeout: float = 30.0) -> TaskStatus:  # noqa: ASYNC109
        """Have a task cancelled, whosever it is, and return how it ended; that may have been by itself.

        Of others' tasks it takes ``control:cancel`` with the agent's policy, beside ``control:observe``: the
        operator does not read the records itself. One of which nothing is recorded yet only its submitter
        can cancel. It is said again every second, for ``timeout`` seconds at most.

        Raises:
            AuthorizationError: the broker does not let this identity cancel tasks there; or as above.
            CallRefusedError: nothing is recorded of it, or it could not be recorded or said.
            CallTimeoutError: the task has not ended in that time. An agent does not answer those whom its
                policy refuses.
            ConfigurationError: the reference is none.

        """
        ref = self._parts.handles.ref_of(reference)
        if ref.sender == self._parts.handles.cancels.me:
            return await self.task(reference).cancel(reason, timeout=timeout)
        said_at = float("-inf")
        try:
            async with asyncio.timeout(timeout):
                while True:
                    task, status = _stands(
                        await self.observe_task(str(ref.agent), str(ref.sender), ref.key), reference
                    )
                    if status.state.terminal:
                        return status
                    if time.monotonic() >= said_at + _REPEAT_S:
                        await self._say_cancel(ref, task, reason)
                        said_at = time.monotonic()
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            raise CallTimeoutError(
                f"{ref.agent} has not cancelled it within {timeout:g} s; it answers nobody whom its policy"
                " refuses"
            ) from None

    async def _say_cancel(self, ref: TaskRef, task: bytes, reason: str) -> None:
        try:
            await self._parts.handles.cancels.send(ref, task=task, pd=None, reason=reason)
        except (BusError, UnreachableError) as error:
            _log.info("a cancellation is said again: %s", error)
        except AgentCallError:
            raise
        except AgentWeaveError as error:
            raise CallRefusedError(f"the cancellation could not be said: {error}", step="local") from error

    def task(self, reference: str) -> TaskHandle:
        """Return the handle of the task that a reference names, to approve of it, or to reject it.

        What that takes is said there; it needs none of the acts above. Raises ConfigurationError.
        """
        return self._parts.handles.named(reference)


class Operator:
    """Connects as an operator, for the length of its block; what is asked for is :class:`OperatorCalls`.

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

    async def __aenter__(self) -> OperatorCalls:
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
        return OperatorCalls(parts)

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


def _stands(told: dict[str, Any], reference: str) -> tuple[bytes, TaskStatus]:
    """Return the digest of a task's head, and where it stands, by what is genuine of its records."""
    try:
        genuine = [row for row in told["records"] if row["genuine"]]
        if genuine:
            last = genuine[-1]
            status = TaskStatus(
                state=TaskState(last["state"]),
                attempt=last["epoch"],
                message=last["message"],
                since_ms=last["at"],
            )
            return bytes.fromhex(last["task"]), status
    except (KeyError, TypeError, ValueError) as error:
        raise AgentCallError("the control role answers with nothing that is understood") from error
    why = f"nothing is recorded of {reference} yet: only its submitter can cancel it"
    raise CallRefusedError(why, step="local", reason=why)


def _checked(letter: str) -> str:
    return str(LetterReference.parse(letter))
