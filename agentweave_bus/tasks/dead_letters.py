"""Dead letters: tasks and events that were given up, as they came, and why.

A dead letter stands in two slots under the agent's own prefix: the frame untouched, so that all that its
sender signed can still be checked, and a signed record of what became of it. It is written before the task's
queue forgets it; written twice, the first one stands.

A frame of which nobody is known to have signed it is not kept: whoever may publish could fill the broker's
disk with such, for as long as dead letters last. The record says how it began, how long it was and what its
SHA-256 is. Only a few of these are written; the others are counted and let go.
"""

from __future__ import annotations

import base64
import logging
import re
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

from agentweave_bus.bus.streams import dead_stream_name
from agentweave_bus.bus.subjects import dead_subject
from agentweave_bus.bus.token_bucket import TokenBucket
from agentweave_bus.envelope import Draft, Kind, encode_payload, new_id
from agentweave_bus.envelope.envelope import sha256
from agentweave_bus.exceptions import ConfigurationError, InvalidSpiffeIdError
from agentweave_bus.names import CAPABILITY_NAME
from agentweave_bus.observability.metrics import DeadCause
from agentweave_bus.spiffe_id import SpiffeID, domain_id
from agentweave_bus.tasks.log import Desk, TaskLog
from agentweave_bus.tasks.queue import Delivery

__all__ = [
    "DEAD_TYPE",
    "DeadEvent",
    "DeadLetterBody",
    "DeadLetters",
    "LetterReference",
]

_log = logging.getLogger(__name__)

DEAD_TYPE: Final = "task.dead"
"""The ``cap`` of a dead letter's record."""

_LIFETIME_MS: Final = 31 * 86_400_000
_MAX_REASON: Final = 2_000
_BEGINNING_BYTES: Final = 1_024
_UNVERIFIED_BURST: Final = 200
_UNVERIFIED_PER_SECOND: Final = 1 / 300
"""Of some 5 KB each: for as long as dead letters are kept that is an eighth of what their stream holds."""
_PLACE: Final = re.compile(r"([0-9a-f]{64})\.(0|[1-9][0-9]{0,8})")


class LetterReference(NamedTuple):
    """What names a dead letter: whose it is, for which capability, its key, and the attempt it ended with."""

    agent: SpiffeID
    capability: str
    key: str
    epoch: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``<agent>#<capability>/<key>.<attempt>``.

        Raises:
            ConfigurationError: it names no dead letter.

        """
        agent, _, rest = text.partition("#")
        capability, _, place = rest.partition("/")
        match = _PLACE.fullmatch(place)
        if match is not None and CAPABILITY_NAME.fullmatch(capability):
            try:
                owner = SpiffeID(agent)
            except InvalidSpiffeIdError:
                pass
            else:
                if owner.path:
                    return cls(owner, capability, match[1], int(match[2]))
        raise ConfigurationError(
            f"{text[:200]!r} names no dead letter.",
            hint="`agentweave dlq list` prints them: <SPIFFE ID of the agent>#<capability>/<key>.<attempt>.",
        )

    def __str__(self) -> str:
        return f"{self.agent}#{self.capability}/{self.key}.{self.epoch}"

    def subject(self, part: str) -> str:
        """Return the slot of its ``frame``, its ``record``, or of that it was ``dropped``."""
        return dead_subject(self.agent, self.capability, self.key, self.epoch, part)


class DeadEvent(NamedTuple):
    """Which event a dead letter is of, and how often its handler was run at most."""

    publisher: SpiffeID
    name: str
    id: str
    attempts: int


class DeadLetterBody(BaseModel):
    """What the record of a dead letter says.

    ``frame`` is the SHA-256 of the frame beside it. One that was never verified is not there: of that
    ``size`` is how many bytes it had, and ``beginning`` its first 1,024, in base64. ``stored_at`` and
    ``given_up_at`` are milliseconds since the epoch; ``delivered`` counts how often the broker gave it out,
    ``attempts`` how often its handler ran; of an event, which has no records, how often it ran at most.
    ``history`` has what was recorded of the task; ``correlation_id`` names the last traceback in the log of
    the worker. Where the frame could be verified, ``task`` is who asked whom for what, and ``event`` who
    published what.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    v: Literal[1] = 1
    reason: Annotated[str, Field(strict=True)]
    frame: Annotated[str, Field(strict=True, pattern="^[0-9a-f]{64}$")]
    stored_at: int
    given_up_at: int
    delivered: int
    attempts: int
    history: list[dict[str, Any]] = Field(default_factory=list)
    correlation_id: str | None = None
    task: dict[str, str] | None = None
    event: dict[str, str] | None = None
    size: int | None = None
    beginning: str | None = None


class DeadLetters:
    """Writes the dead letters of one agent."""

    def __init__(
        self,
        agent: SpiffeID,
        desk: Desk,
        on_written: Callable[[str, DeadCause], None] = lambda _name, _cause: None,
    ) -> None:
        self._agent = agent
        self._desk = desk
        self._on_written = on_written
        self._stream = dead_stream_name(agent)
        self._unverified = TokenBucket(_UNVERIFIED_BURST)
        self._unwritten = 0

    async def write(
        self,
        delivery: Delivery,
        reason: str,
        *,
        log: TaskLog | None = None,
        digest: bytes | None = None,
        correlation_id: str | None = None,
        event: DeadEvent | None = None,
        cause: DeadCause = DeadCause.FAILED,
    ) -> None:
        """Write down that a delivery is given up.

        ``log`` and ``digest`` are those of a verified task; of a verified event there are ``digest`` and
        ``event``. Without a ``digest`` nobody is known to have signed it: then its frame is not kept, and
        beyond a rate nothing is written at all. By ``cause`` it is counted.

        Raises:
            BusError: it could not be written, so it must not be acknowledged.

        """
        desk = self._desk
        if digest is None and not self._may_write(delivery.subject):
            return
        capability = delivery.subject.rpartition(".")[2].partition("=")[0]  # of whatever priority
        frame_hash = sha256(delivery.data).hex()
        # Another task under a key that is taken must not stand in that task's place.
        own = log is not None and (log.last is None or log.last.task == digest)
        key, attempts = (log.ref.key, log.epoch) if log is not None and own else (frame_hash, 0)
        if digest is not None:
            place = dead_subject(self._agent, capability, key, attempts, "frame")
            await desk.slots.put(self._stream, place, delivery.data)
        now_ms = desk.clock_ms()
        body = DeadLetterBody(
            reason=reason[:_MAX_REASON],
            frame=frame_hash,
            stored_at=delivery.stored_at_ms,
            given_up_at=now_ms,
            delivered=delivery.delivered,
            attempts=_runs(log if own else None) if event is None else event.attempts,
            history=[] if log is None else _history(log),
            correlation_id=correlation_id,
            task=None if log is None else _task(log),
            event=None if event is None else _event(event),
            **({} if digest is not None else _traits(delivery.data)),
        )
        draft = Draft(
            kind=Kind.RECORD,
            id=new_id(now_ms),
            aud=domain_id(self._agent.trust_domain),
            cap=DEAD_TYPE,
            sub=dead_subject(self._agent, capability, key, attempts, "record"),
            iat=now_ms,
            exp=now_ms + _LIFETIME_MS,
            re=digest,
            att=attempts,
            log=desk.witness(),
        )
        payload = encode_payload(body.model_dump(mode="json", exclude_none=True))
        sealed = await desk.sealer.seal(draft, payload)
        if await desk.slots.put(self._stream, draft["sub"], sealed.frame) is None:
            name = capability if event is None else event.name
            self._on_written(name, DeadCause.UNVERIFIED if digest is None else cause)

    def _may_write(self, subject: str) -> bool:
        """Say whether one more that was never verified may be written down."""
        if not self._unverified.take(
            self._desk.clock_ms(), size=_UNVERIFIED_BURST, per_second=_UNVERIFIED_PER_SECOND
        ):
            if self._unwritten == 0:
                _log.error("too many frames on %s can't be verified: they are let go and counted", subject)
            self._unwritten += 1
            return False
        if self._unwritten:
            _log.error("%d frames that can't be verified left no dead letter", self._unwritten)
            self._unwritten = 0
        return True


def _traits(frame: bytes) -> dict[str, Any]:
    return {"size": len(frame), "beginning": base64.b64encode(frame[:_BEGINNING_BYTES]).decode()}


def _history(log: TaskLog) -> list[dict[str, Any]]:
    return [
        {
            "state": record.state.value,
            "epoch": record.epoch,
            "at": record.at_ms,
            "digest": record.digest.hex(),
            **({} if record.body.undoes is None else {"undoing": True}),
            **({} if record.body.message is None else {"message": record.body.message}),
        }
        for record in log.records
    ]


def _runs(log: TaskLog | None) -> int:
    return 0 if log is None else log.runs()


def _task(log: TaskLog) -> dict[str, str]:
    ref = log.ref
    return {"id": ref.id, "sender": str(ref.sender), "capability": ref.capability}


def _event(event: DeadEvent) -> dict[str, str]:
    return {"id": event.id, "publisher": str(event.publisher), "name": event.name}
