"""What operators can have done with dead letters: list them, look at one, redrive it, drop it.

The control role does it for them: it alone reads everybody's dead letters, and its reissue alone brings a
task back. Who may ask is decided before (:mod:`.operators`). What holds here:

- A redrive brings back what its sender asked for and an agent verified, and nothing else: the frame verifies
  again, by the time of its signing; the agent's own log says that the task has failed in just that attempt.
  Whatever never verified can't be redriven. Asked for twice it may be queued twice; it runs once.
- An event is not redriven. A reissue is for whom its task was for, and an event is for nobody by name: what
  the control role signed in its stead for one agent would be its own word, not the publisher's.
- A dead letter that is dropped stays where it is for as long as it is kept. A record beside it says that it
  is dealt with, so that it is listed no more.

All of it may be asked for again without harm, so none of it is claimed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

from agentweave_bus.authz import AuditLog
from agentweave_bus.bus.connection import Keeper
from agentweave_bus.bus.records import sealed_facts
from agentweave_bus.bus.slots import SlotOutcome, acknowledged
from agentweave_bus.bus.streams import STATE_MAX_AGE_S, dead_stream_name, tasks_stream_name
from agentweave_bus.control.letters import (
    DROPPED_TYPE,
    DeadEventError,
    DeadTask,
    Letter,
    Letters,
    UnusableLetterError,
)
from agentweave_bus.control.reissue import reissue_draft
from agentweave_bus.envelope import (
    Draft,
    Head,
    Kind,
    OpenedEnvelope,
    Sealed,
    Sealer,
    decode_payload,
    encode_payload,
    new_id,
    occurrence_id,
    verify_delegation,
)
from agentweave_bus.exceptions import (
    BusError,
    EnvelopeError,
    FederationError,
    IdentityError,
    PayloadError,
    QueueFullError,
)
from agentweave_bus.spiffe_id import SpiffeID, domain_id
from agentweave_bus.tasks.dead_letters import LetterReference
from agentweave_bus.tasks.log import Desk, TaskLog
from agentweave_bus.tasks.redrive import redriven_attempt
from agentweave_bus.types import TaskState

__all__ = ["DeadLetterOffice"]

_log = logging.getLogger(__name__)

_SESSION_S: Final = 5.0
_ANSWER_S: Final = 5.0
_WRITE_S: Final = 10.0
_LIFETIME_MS: Final = 31 * 86_400_000
_RECORDED_MS: Final = STATE_MAX_AGE_S * 1000
_MARGIN_MS: Final = 86_400_000
"""How long what is recorded of a task outlasts a redrive of it: for what runs then to end by that record."""

_MOST_LOOKED_AT: Final = 1_000
_MAX_LISTED_REASON: Final = 300
_NO_REDRIVE: Final = "a dead event can't be redriven: its publisher may publish it again, for all who hear it"
_DEALT_WITH: Final = frozenset({"dropped", "redriven"})


class DeadLetterOffice:
    """Works on the dead letters of all agents at a broker, as the control role ``me``.

    ``desk`` is its own; ``sealer_of`` returns with what to sign for an agent as the control role of its trust
    domain, and ``None`` for one whose tasks can't be brought back here. ``everyone`` are the identities whose
    dead letters there may be. Each reissue is in ``audit`` before it is queued.
    """

    def __init__(
        self,
        me: SpiffeID,
        *,
        keeper: Keeper,
        desk: Desk,
        sealer_of: Callable[[SpiffeID], Sealer | None],
        everyone: Callable[[], Iterable[SpiffeID]],
        audit: AuditLog,
    ) -> None:
        self._me = me
        self._keeper = keeper
        self._desk = desk
        self._sealer_of = sealer_of
        self._everyone = everyone
        self._audit = audit
        self._letters = Letters(me, keeper, desk)

    async def listed(
        self, agent: SpiffeID | None, *, limit: int, after: tuple[SpiffeID, int] | None, every: bool
    ) -> dict[str, Any]:
        """Return at most ``limit`` dead letters, the oldest of each agent first, and where to go on.

        ``after`` is where to go on from; with ``every`` also those that are dealt with are listed.

        Raises:
            BusError: the broker does not answer.

        """
        rows: list[dict[str, Any]] = []
        looked_at = 0
        for one in sorted(set(self._everyone())):
            if (agent is not None and one != agent) or (after is not None and one < after[0]):
                continue
            number = after[1] if after is not None and one == after[0] else 0
            while (found := await self._letters.next_of(one, number + 1)) is not None:
                number, letter = found
                looked_at += 1
                row = None if letter is None else await self._row(letter)
                if row is not None and (every or row["state"] not in _DEALT_WITH):
                    rows.append(row)
                if len(rows) >= limit or looked_at >= _MOST_LOOKED_AT:
                    return {"letters": rows, "after": f"{one}@{number}"}
        return {"letters": rows, "after": None}

    async def shown(self, ref: LetterReference, *, payload: bool) -> dict[str, Any]:
        """Return all that is known of one; with ``payload`` what was asked for, too.

        Raises:
            UnusableLetterError: there is no such one.
            BusError: the broker does not answer.

        """
        letter = await self._letters.find(ref)
        told = await self._row(letter)
        if letter.body is None:
            return told
        if (dropped := await self._letters.dropped(ref)) is not None:
            told["dropped"] = dropped
        told |= letter.body.model_dump(mode="json", exclude={"v", "event"}, exclude_none=True)
        if letter.body.event is not None:
            told |= await self._event_shown(letter, payload=payload)
            return told
        log = await self._letters.log_of(letter)
        if log is not None and log.last is not None:
            told["now"] = {"state": log.last.state.value, "attempt": log.last.epoch, "since": log.last.at_ms}
        try:
            task = await self._letters.task_in(letter, log)
            self._check_redrivable(letter, task, log)
        except UnusableLetterError as error:
            told["not_redrivable"] = str(error)
            return told
        told["signed"] = _signed(task.origin.head, task.origin.digest)
        if payload:
            told["payload"] = decode_payload(task.opened.payload)
        return told

    async def redrive(
        self, ref: LetterReference, *, seconds: float, operator: SpiffeID, request: bytes
    ) -> dict[str, Any]:
        """Have the task in a dead letter begin anew, within ``seconds``.

        ``operator`` has asked for it, by the request of which the head has the digest ``request``.

        Raises:
            DeadEventError: it is an event, and no task.
            UnusableLetterError: it can't be redriven; the message says why.
            QueueFullError: the agent's queue takes nothing more.
            BusError: the broker gives no clear answer; it may be asked for again.
            AuditError: it could not be recorded, so nothing was done.

        """
        letter = await self._letters.find(ref)
        if letter.body is not None and letter.body.event is not None:
            name = (await self._letters.event_in(letter)).head.cap
            raise DeadEventError(f"{ref}: {_NO_REDRIVE}.", name=name)
        log = await self._letters.log_of(letter)
        task = await self._letters.task_in(letter, log)
        latest_ms = self._check_redrivable(letter, task, log)
        sealed = await self._reissued(ref, task, seconds, latest_ms)
        await self._audit.record(
            {
                "event": "reissue",
                **sealed_facts(sealed),
                "task": task.origin.digest.hex(),
                "attempt": ref.epoch + 1,
                "letter": str(ref),
                "operator": str(operator),
                "request": request.hex(),
            }
        )
        await self._queue(sealed)
        _log.warning("%s is redriven for %s", ref, operator)
        return {
            "letter": str(ref),
            "reference": f"{ref.agent}#{ref.capability}/{task.opened.head.id}",
            "attempt": ref.epoch + 1,
            "expires": sealed.head.exp,
            "digest": sealed.digest.hex(),
        }

    async def drop(self, ref: LetterReference, *, reason: str, operator: SpiffeID) -> dict[str, Any]:
        """Put on record that a dead letter is dealt with; once.

        Raises:
            UnusableLetterError: there is no such one, it is of another trust domain, or something else stands
                where that is recorded.
            BusError: the broker does not answer.

        """
        self._check_mine(ref)
        await self._letters.find(ref)
        dropped = await self._letters.dropped(ref)
        if dropped is None:
            sealed = await self._drop_record(ref, reason, operator)
            await self._desk.slots.put(
                dead_stream_name(ref.agent), sealed.head.sub, sealed.frame, deadline_s=_WRITE_S
            )
            dropped = await self._letters.dropped(ref)
        if dropped is None:
            raise UnusableLetterError(
                "something else stands where that would be recorded, so it stays listed"
            )
        return {"letter": str(ref), "dropped": dropped}

    # --- looking -----------------------------------------------------------------------------------------

    async def _row(self, letter: Letter) -> dict[str, Any]:
        body, task = letter.body, letter.task
        state, event = await self._state(letter)
        row: dict[str, Any] = {
            "letter": str(letter.ref),
            "state": state,
            "reason": (f"not believed: {letter.doubt}" if body is None else body.reason)[:_MAX_LISTED_REASON],
            "given_up_at": letter.stored.stored_at_ms if body is None else body.given_up_at,
        }
        if body is not None:
            row["attempts"] = body.attempts
        if task is not None:
            row["task"] = {"id": task.id, "sender": str(task.sender), "capability": task.capability}
        if event is not None:
            row["event"] = _event_facts(event)
        return row

    async def _state(self, letter: Letter) -> tuple[str, OpenedEnvelope | None]:
        """Say what an operator has to know first, ``waiting`` if it can be redriven; and of which event."""
        dropped = await self._letters.dropped(letter.ref) is not None
        if letter.body is None:
            return "dropped" if dropped else "doubtful", None
        event: OpenedEnvelope | None = None
        try:
            if letter.body.event is not None:
                event = await self._letters.event_in(letter)
                state = "event"
            elif dropped or (log := await self._letters.log_of(letter)) is None:
                state = "unverified"
            else:
                state = "redriven" if log.epoch > letter.ref.epoch else "waiting"
        except BusError as error:
            _log.warning("what stands behind %s is not read: %s", letter.ref, error)
            state = "unreadable"
        except UnusableLetterError as error:
            _log.warning("%s is of no event that verifies: %s", letter.ref, error)
            state = "unverified"
        return "dropped" if dropped else state, event

    async def _event_shown(self, letter: Letter, *, payload: bool) -> dict[str, Any]:
        try:
            event = await self._letters.event_in(letter)
        except UnusableLetterError as error:
            return {"not_redrivable": str(error)}
        told = {"not_redrivable": _NO_REDRIVE, "signed": _signed(event.head, event.digest)}
        return told | ({"payload": decode_payload(event.payload)} if payload else {})

    def _check_redrivable(self, letter: Letter, task: DeadTask, log: TaskLog | None) -> int:
        """Make sure that the task has failed in just that attempt, by its agent's own records.

        Returns until when a redrive may be good at most (milliseconds since the epoch).
        """
        ref = letter.ref
        self._check_mine(ref)
        last = None if log is None else log.last
        if log is None or last is None:
            raise UnusableLetterError("nothing is recorded of the task any more")
        if last.task != task.origin.digest:
            raise UnusableLetterError("its id was used for another task, which is the one on record")
        if last.epoch > ref.epoch:
            raise UnusableLetterError(
                f"it was redriven already, and is {last.state.value} in attempt {last.epoch}"
            )
        if last.state is not TaskState.FAILED or last.epoch != ref.epoch:
            raise UnusableLetterError(f"the task has not failed: it is {last.state.value}")
        began_ms = log.begun_ms(redriven_attempt(task.opened.head))
        if began_ms is None or log.oldest_ms is None:
            raise UnusableLetterError("nothing is recorded of when it was begun")
        self._letters.check_in_time(task, began_ms)
        latest_ms = log.oldest_ms + _RECORDED_MS - _MARGIN_MS
        if latest_ms <= self._desk.clock_ms():
            raise UnusableLetterError("what is recorded of the task is about to be forgotten")
        return latest_ms

    def _check_mine(self, ref: LetterReference) -> None:
        if self._sealer_of(ref.agent) is None:
            told = f"{self._me} acts for its own trust domain, not for {ref.agent.trust_domain}"
            raise UnusableLetterError(told)

    # --- doing -------------------------------------------------------------------------------------------

    async def _reissued(self, ref: LetterReference, task: DeadTask, seconds: float, latest_ms: int) -> Sealed:
        sealer, now_ms = self._sealer_of(ref.agent), self._desk.clock_ms()
        assert sealer is not None  # it was looked at
        head, origin = task.opened.head, task.origin
        draft = reissue_draft(
            origin.head,
            task_id=head.id,
            now_ms=now_ms,
            expires_ms=min(now_ms + int(seconds * 1000), latest_ms),
            # By it an occurrence is known for one of its recurring task.
            nbf=head.nbf if _is_occurrence(task) else None,
            attempt=ref.epoch + 1,
            log=self._audit.witness(),
        )
        via = task.opened.via if head.kind is Kind.REISSUE else (*task.opened.via, origin)
        try:
            sealed = await sealer.seal(draft, task.opened.payload, via)
            verifier = self._desk.verifier
            # As the agent will: what it would refuse is told to the operator, and not queued.
            verify_delegation(verifier.open(sealed.frame, now_ms=now_ms), verifier, now_ms=now_ms)
        except (EnvelopeError, IdentityError, FederationError, PayloadError) as error:
            raise UnusableLetterError(f"it can't be brought back: {error}") from error
        return sealed

    async def _queue(self, sealed: Sealed) -> None:
        session = await self._keeper.session(_SESSION_S)
        stream = tasks_stream_name(sealed.head.aud)
        try:
            answer = await session.ask(sealed.head.sub, sealed.frame, timeout_s=_ANSWER_S)
        except TimeoutError:
            outcome = SlotOutcome.UNCLEAR
        else:
            outcome = acknowledged(answer, stream)
        if outcome is SlotOutcome.FULL:
            raise QueueFullError(f"the queue of {sealed.head.aud} is full")
        if outcome is not SlotOutcome.WRITTEN:
            raise BusError(f"it is not clear whether the task is queued ({outcome.value}); ask again")

    async def _drop_record(self, ref: LetterReference, reason: str, operator: SpiffeID) -> Sealed:
        now_ms = self._desk.clock_ms()
        draft = Draft(
            kind=Kind.RECORD,
            id=new_id(now_ms),
            aud=domain_id(ref.agent.trust_domain),
            cap=DROPPED_TYPE,
            sub=ref.subject("dropped"),
            iat=now_ms,
            exp=now_ms + _LIFETIME_MS,
            att=ref.epoch,
            log=self._audit.witness(),
        )
        return await self._desk.sealer.seal(draft, encode_payload({"by": str(operator), "reason": reason}))


def _signed(head: Head, digest: bytes) -> dict[str, Any]:
    return {"iat": head.iat, "exp": head.exp, "digest": digest.hex(), "ct": head.ct}


def _event_facts(event: OpenedEnvelope) -> dict[str, Any]:
    head = event.head
    facts = {"id": head.id, "publisher": str(head.iss), "name": head.cap}
    return facts | ({} if head.idk is None else {"key": head.idk})


def _is_occurrence(task: DeadTask) -> bool:
    head, origin = task.opened.head, task.origin.head
    return head.nbf is not None and head.id != origin.id and head.id == occurrence_id(origin.id, head.nbf)
