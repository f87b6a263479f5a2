"""What operators may have the control role do, by signed calls.

The control role answers operators as an agent answers its callers: through the same gate, with signed
answers. What differs is what its policy is asked. Each of these capabilities is an operators' act
(:mod:`agentweave_bus.tasks.operator_acts`), so that ``operators`` in the grants says who may, and grants of
capabilities never do. The operator's own policy is asked the same beforehand.

Every request that is admitted or refused is in the audit log of the control role, and its outcome; of what a
console asks each second one a minute is, with the number of the others.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import anyio.to_thread
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from agentweave_bus.authz import AuditLog, Authorizer, AuthzContext, AuthzDecision, PolicyWatch
from agentweave_bus.authz.repeats import Repeats
from agentweave_bus.authz.wasm import EmbeddedEngine
from agentweave_bus.bus.admission import Admission, Admitted
from agentweave_bus.bus.claims import Claims
from agentweave_bus.bus.connection import Keeper
from agentweave_bus.bus.occupancy import Occupancy
from agentweave_bus.bus.responder import Responder
from agentweave_bus.bus.slots import Slots
from agentweave_bus.control.dead_letters import DeadLetterOffice
from agentweave_bus.control.letters import DeadEventError, UnusableLetterError
from agentweave_bus.control.observing import Observatory
from agentweave_bus.control.queue_figures import QueueFigures
from agentweave_bus.control.stream_reader import StreamReader
from agentweave_bus.envelope import (
    JSON_CONTENT_TYPE,
    EnvelopeVerifier,
    OpenedEnvelope,
    Sealer,
    VerifiedLink,
    requester,
)
from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError, InvalidSpiffeIdError, PayloadError
from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.dead_letters import LetterReference
from agentweave_bus.tasks.log import Desk
from agentweave_bus.tasks.operator_acts import OPERATOR_CAPABILITIES, WATCHING
from agentweave_bus.types import DataPart, Message, TaskResult

__all__ = ["OperatorService", "operator_service"]

_log = logging.getLogger(__name__)

_PLACES: Final = 4
_MAX_BYTES: Final = 8 * 1024 * 1024
_LONGEST_S: Final = 31 * 86_400
_MOST_AGENTS: Final = 4_096
_KEY: Final = "^[0-9a-f]{64}$"


def _letter(text: object) -> LetterReference:
    try:
        return LetterReference.parse(str(text))
    except ConfigurationError as error:
        raise ValueError(str(error)) from error


def _agent(text: object) -> SpiffeID:
    try:
        return SpiffeID(str(text))
    except InvalidSpiffeIdError as error:
        raise ValueError(str(error)) from error


def _place(text: object) -> tuple[SpiffeID, int]:
    agent, _, number = str(text).rpartition("@")
    if not number.isdecimal() or len(number) > 16:  # noqa: PLR2004 - digits of a sequence
        raise ValueError(f"{str(text)[:200]!r} is nothing that a list ended with")
    return _agent(agent), int(number)


def _cursor(value: object) -> dict[SpiffeID, int] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > _MOST_AGENTS:
        raise ValueError("this is nothing that an answer ended with")
    # Whatever a broker says; where none of its streams is so long, it is begun anew near the end.
    if not all(type(at) is int and 0 <= at < 2**64 for at in value.values()):
        raise ValueError("where to go on is a number of each agent's records")
    return {_agent(agent): at for agent, at in value.items()}


_Letter = Annotated[Any, BeforeValidator(_letter)]
_Agent = Annotated[Any, BeforeValidator(_agent)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class _List(_Asked):
    agent: _Agent = None
    limit: Annotated[int, Field(strict=True, ge=1, le=200)] = 50
    after: Annotated[Any, BeforeValidator(_place)] = None
    all: Annotated[bool, Field(strict=True)] = False


class _Show(_Asked):
    letter: _Letter
    payload: Annotated[bool, Field(strict=True)] = False


class _Redrive(_Asked):
    letter: _Letter
    deadline: Annotated[float, Field(gt=0, le=_LONGEST_S)] = 86_400.0


class _Drop(_Asked):
    letter: _Letter
    reason: Annotated[str, Field(strict=True, max_length=1_000)] = ""


class _Queues(_Asked):
    pass


class _Records(_Asked):
    after: Annotated[Any, BeforeValidator(_cursor)] = None
    limit: Annotated[int, Field(strict=True, ge=1, le=200)] = 100


class _Task(_Asked):
    agent: _Agent
    sender: _Agent
    key: Annotated[str, Field(strict=True, pattern=_KEY)]


class _Wanted(NamedTuple):
    """A request that fits its capability: as it is read here, and as a policy sees it."""

    body: _Asked
    policy_payload: dict[str, Any]


class _Verb(NamedTuple):
    """A capability of the control role. It is safe to be asked for again, so nothing is claimed."""

    name: str
    takes: type[_Asked]
    safe: bool = True
    content_type: str = JSON_CONTENT_TYPE

    def validate(self, value: Any) -> _Wanted:
        """Check a payload. Raises PayloadError."""
        try:
            body = self.takes.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise PayloadError(f"{place or 'the payload'}: {first['msg']}") from error
        fields = self.takes.model_fields.items()
        defaults = {name: field.default for name, field in fields if not field.is_required()}
        return _Wanted(body, {**defaults, **value})

    def admits_peer(self, caller: SpiffeID) -> str | None:  # noqa: ARG002 - the policy decides
        """Leave it to the policy."""
        return None


_TAKEN: Final[dict[str, type[_Asked]]] = {
    "dlq_list": _List,
    "dlq_show": _Show,
    "dlq_redrive": _Redrive,
    "dlq_drop": _Drop,
    "observe_queues": _Queues,
    "observe_records": _Records,
    "observe_task": _Task,
}
_VERBS: Final = {name: _Verb(name, _TAKEN[name]) for name in OPERATOR_CAPABILITIES}


class _OperatorAdmission(Admission):
    """The gate of the control role: whatever is asked for, the policy decides on the operators' act."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self._repeats = Repeats()

    def _facts(
        self, request: OpenedEnvelope, via: tuple[VerifiedLink, ...], payload: Any = None, **more: Any
    ) -> AuthzContext:
        return replace(
            super()._facts(request, via, payload, **more), action=OPERATOR_CAPABILITIES[request.head.cap]
        )

    async def _record_admission(
        self,
        request: OpenedEnvelope,
        facts: AuthzContext,
        decision: AuthzDecision,
        *,
        keep: bool,
        more: Mapping[str, Any] | None = None,
    ) -> str:
        """Step 12, once a minute for who watches: the others are counted, and have no outcome either."""
        head, now_ms = request.head, self._clock_ms()
        if head.cap not in WATCHING:
            return await super()._record_admission(request, facts, decision, keep=keep, more=more)
        kind = (head.iss, facts.caller, head.cap, decision.revision)
        before = self._repeats.due(kind, now_ms)
        if before is None:
            return ""
        audit_id = await super()._record_admission(request, facts, decision, keep=keep, more=before)
        self._repeats.recorded(kind, now_ms)
        return audit_id


_Does = Callable[[Any, Admitted], Awaitable[dict[str, Any]]]


class OperatorService:
    """Answers operators, as the control role ``me``. Make it before the keeper opens."""

    def __init__(
        self,
        me: SpiffeID,
        *,
        keeper: Keeper,
        desk: Desk,
        authorizer: Authorizer,
        audit: AuditLog,
        office: DeadLetterOffice,
        figures: QueueFigures,
        observatory: Observatory,
    ) -> None:
        self._authorizer = authorizer
        self._office = office
        self._figures = figures
        self._observatory = observatory
        metrics, occupancy = Metrics.create(), Occupancy(_PLACES, _MAX_BYTES)
        admission = _OperatorAdmission(
            me=me,
            verifier=desk.verifier,
            capabilities=_VERBS,
            authorizer=authorizer,
            audit=audit,
            claims=Claims(me, keeper),
            occupancy=occupancy,
            metrics=metrics,
            clock_ms=desk.clock_ms,
        )
        self._responder = Responder(
            me=me,
            capabilities=_VERBS,
            admission=admission,
            dispatch=self._dispatch,
            sealer=desk.sealer,
            audit=audit,
            metrics=metrics,
            clock_ms=desk.clock_ms,
            taken_in=occupancy.taken_in,
            queued_bytes=_MAX_BYTES,
        )
        self._does: dict[str, _Does] = {
            "dlq_list": self._list,
            "dlq_show": self._show,
            "dlq_redrive": self._redrive,
            "dlq_drop": self._drop,
            "observe_queues": self._queues,
            "observe_records": self._records,
            "observe_task": self._task,
        }
        keeper.on_session(self._responder.on_session)

    async def run(self) -> None:
        """Answer, and follow changes of the grants, until cancelled. The caller owns this task."""
        async with self._responder.running():
            await self._authorizer.run()

    async def reload(self) -> None:
        """Take changed grants now, and not within a second."""
        await self._authorizer.reload()

    async def _dispatch(self, admitted: Admitted) -> dict[str, Any]:
        wanted, name = admitted.payload, admitted.capability.name
        assert isinstance(wanted, _Wanted)
        try:
            told = await self._does[name](wanted.body, admitted)
        except DeadEventError as error:
            # By the event's name the operator's side knows that asking for this was the mistake.
            facts = Message("assistant", [DataPart({"event": error.name})])
            return TaskResult("failed", [facts], error=str(error)).to_json()
        except UnusableLetterError as error:
            return TaskResult(status="failed", error=str(error)).to_json()
        except (AgentWeaveError, TimeoutError) as error:
            _log.warning("%s could not be done for an operator: %s", name, error)
            return TaskResult(status="failed", error=str(error) or "the broker does not answer").to_json()
        except Exception:  # noqa: BLE001 - the last boundary: what is to be answered never raises
            _log.exception("%s ended in an error of the control role itself", name)
            return TaskResult(status="failed", error="internal error of the control role").to_json()
        return TaskResult("completed", [Message("assistant", [DataPart(told)])]).to_json()

    async def _list(self, asked: _List, _admitted: Admitted) -> dict[str, Any]:
        return await self._office.listed(asked.agent, limit=asked.limit, after=asked.after, every=asked.all)

    async def _show(self, asked: _Show, _admitted: Admitted) -> dict[str, Any]:
        return await self._office.shown(asked.letter, payload=asked.payload)

    async def _redrive(self, asked: _Redrive, admitted: Admitted) -> dict[str, Any]:
        return await self._office.redrive(
            asked.letter,
            seconds=asked.deadline,
            operator=_who(admitted),
            request=admitted.request.digest,
        )

    async def _drop(self, asked: _Drop, admitted: Admitted) -> dict[str, Any]:
        return await self._office.drop(asked.letter, reason=asked.reason, operator=_who(admitted))

    async def _queues(self, _asked: _Queues, _admitted: Admitted) -> dict[str, Any]:
        return await self._figures.told()

    async def _records(self, asked: _Records, _admitted: Admitted) -> dict[str, Any]:
        return await self._observatory.records(asked.after, limit=asked.limit)

    async def _task(self, asked: _Task, _admitted: Admitted) -> dict[str, Any]:
        return await self._observatory.task(asked.agent, asked.sender, asked.key)


def _who(admitted: Admitted) -> SpiffeID:
    return requester(admitted.request, admitted.via).iss


@asynccontextmanager
async def operator_service(
    me: SpiffeID,
    *,
    keeper: Keeper,
    sealer: Sealer,
    verifier: EnvelopeVerifier,
    sealer_of: Callable[[SpiffeID], Sealer | None],
    everyone: Callable[[], Iterable[SpiffeID]],
    policy: Path | None,
    audit: Path,
    time_ns: Callable[[], int] = time.time_ns,
    monotonic: Callable[[], float] = time.monotonic,
) -> AsyncIterator[OperatorService]:
    """Make all that it takes to answer operators, before ``keeper`` opens; take it down at the end.

    ``policy`` is a policy directory or a grants file, ``audit`` the file of the control role's audit log. The
    others are as for :class:`~agentweave_bus.control.dead_letters.DeadLetterOffice`.

    Raises:
        PolicyLoadError: the policy can't be loaded.
        ConfigurationError: the grants are wrong.
        AuditError: the audit log can't be written.

    """

    def clock_ms() -> int:
        return time_ns() // 1_000_000

    engine, watch = EmbeddedEngine(now_ns=time_ns), None
    if policy is None:
        await anyio.to_thread.run_sync(engine.load, None)
    else:
        watch = await anyio.to_thread.run_sync(PolicyWatch, policy, engine.load)
    log = await anyio.to_thread.run_sync(
        partial(AuditLog, audit, f"{me} pid {os.getpid()}", clock_ms=clock_ms)
    )
    try:
        desk = Desk(Slots(keeper, monotonic), sealer, verifier, clock_ms, log.witness)
        reader = StreamReader(keeper)
        yield OperatorService(
            me,
            keeper=keeper,
            desk=desk,
            authorizer=Authorizer(engine, watch=watch, monotonic=monotonic, wall=lambda: time_ns() / 1e9),
            audit=log,
            office=DeadLetterOffice(
                me, keeper=keeper, desk=desk, sealer_of=sealer_of, everyone=everyone, audit=log
            ),
            figures=QueueFigures(reader, everyone, monotonic),
            observatory=Observatory(reader, desk, everyone),
        )
    finally:
        await log.aclose()
        await engine.aclose()
