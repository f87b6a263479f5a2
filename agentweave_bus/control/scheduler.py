"""Delayed and recurring tasks: from where they are parked to the queue, each when it is due.

A task that is not due yet stands in its agent's parked stream, as its sender signed it. What happens to it:

1. The control role gets it once, verifies it (:mod:`.parking`), and has the broker schedule a *wake-up*: a
   message in a stream to which only the control role may publish. It says where the parked task stands, and
   is believed in nothing else.
2. When the time has come the broker gives out the wake-up. The control role reads the parked task again,
   verifies it again, and looks into the task's log: whoever wrote ``canceled`` there has ended it.
3. It signs a *reissue*, whose last link is the parked task, and publishes it to the queue. For a recurring
   task it plans the next wake-up; of another one it deletes what was parked.
4. Only then is the wake-up acknowledged.

So whatever is killed in between, the broker included, is made up for: the wake-up comes again, and is done
again with the same ids. The worker that finds a task in the queue twice sees by its log that it is one task.
Several control roles share the work; what two of them do at once is done twice in the same way.

What one sender may have parked is bounded (:mod:`.shares`); what is more is recorded as ``rejected``.

A recurring task's occurrences that were missed, because no control role was there, are not made up for, but
for the latest. An occurrence may be begun for a day at most, and not after the end of its task.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import anyio

from agentweave_bus.bus.connection import Keeper, Session
from agentweave_bus.bus.slots import SlotOutcome, Slots, acknowledged, nanoseconds_of
from agentweave_bus.bus.stream_limits import DEFAULT_STREAM_LIMITS, StreamLimits
from agentweave_bus.bus.streams import (
    PARKED_CONSUMER,
    ConsumerSpec,
    parked_consumer,
    parked_stream,
    tasks_stream_name,
    wakeups_consumer,
    wakeups_stream,
)
from agentweave_bus.bus.subjects import Family, wakeup_subject, wakeups_prefix
from agentweave_bus.bus.task_groups import owned_tasks
from agentweave_bus.control.feeds import Feeds
from agentweave_bus.control.parking import NotBroughtBackError, ParkedTask, agent_of_parked, open_parked
from agentweave_bus.control.reconcile import reconcile_consumers, reconcile_streams
from agentweave_bus.control.reissue import reissue_draft
from agentweave_bus.control.shares import Holding, Place, Shares
from agentweave_bus.envelope import EnvelopeVerifier, Sealed, Sealer, occurrence_id
from agentweave_bus.exceptions import (
    AgentWeaveError,
    BusError,
    MalformedEnvelopeError,
    UnreachableError,
)
from agentweave_bus.observability.metrics import DeadCause
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.dead_letters import DeadLetters
from agentweave_bus.tasks.log import Desk, TaskLog
from agentweave_bus.tasks.queue import Acknowledgements, Delivery
from agentweave_bus.tasks.record import RecordBody, TaskRef
from agentweave_bus.types import TaskState

__all__ = ["OCCURRENCE_S", "Scheduler"]

_log = logging.getLogger(__name__)

OCCURRENCE_S: Final = 86_400
"""How long after its time an occurrence of a recurring task may still be begun, in seconds."""

_LOOK_S: Final = 30.0
_SESSION_S: Final = 15.0
_ANSWER_S: Final = 5.0
_LONGEST_PAUSE_S: Final = 60.0
_UNREADABLE_DELIVERIES: Final = 10
_MAX_MESSAGE: Final = 2_000
_PARKED: Final = "parked-"
_NO_MESSAGE: Final = 10037
_NO_STREAM: Final = 10059


class Scheduler:
    """Brings parked tasks back, as the control role ``me``. Owned by whoever runs :meth:`run`.

    ``sealer_of`` returns with what to sign for an agent, as the control role of its trust domain; ``None`` of
    an agent for which this control role can't. Such agents can't be given delayed tasks here. ``look_s`` is
    how often it looks for what other control roles have made, in seconds.
    """

    def __init__(
        self,
        me: SpiffeID,
        *,
        keeper: Keeper,
        verifier: EnvelopeVerifier,
        sealer_of: Callable[[SpiffeID], Sealer | None],
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        monotonic: Callable[[], float] = time.monotonic,
        limits: StreamLimits = DEFAULT_STREAM_LIMITS,
        look_s: float = _LOOK_S,
        on_given_up: Callable[[str, DeadCause], None] = lambda _capability, _cause: None,
    ) -> None:
        self._me = me
        self._look_s = look_s
        self._on_given_up = on_given_up
        self._domain = me.trust_domain
        self._keeper = keeper
        self._verifier = verifier
        self._sealer_of = sealer_of
        self._clock_ms = clock_ms
        self._limits = limits
        self._slots = Slots(keeper, monotonic)
        self._acknowledgements = Acknowledgements(keeper)
        self._shares = Shares()
        self._dead_letters: dict[SpiffeID, DeadLetters] = {}
        self._wakeups = wakeups_stream(self._domain, limits=limits)
        self._feeds = Feeds(me, keeper, self._take, monotonic=monotonic)

    async def serve(self, session: Session, agent: SpiffeID) -> list[str]:
        """Make what it takes to park tasks for ``agent``; return the names of what was made.

        Raises:
            BusError: the broker does not answer.
            ConfigurationError: something exists in a form that can't be changed into the declared one.

        """
        if self._sealer_of(agent) is None:
            return []
        made = await reconcile_streams(session, [parked_stream(agent, limits=self._limits)])
        made += await reconcile_consumers(session, [parked_consumer(agent)])
        self._feeds.add(parked_consumer(agent))
        return made

    async def prepare(self) -> None:
        """Make the stream of wake-ups, and find whatever is parked already. Raises as :meth:`serve`."""
        session = await self._keeper.session(_SESSION_S)
        await reconcile_streams(session, [self._wakeups])
        await reconcile_consumers(session, [wakeups_consumer(self._domain)])
        self._feeds.add(wakeups_consumer(self._domain))
        await self._find_parked(session)

    async def run(self) -> None:
        """Look after parked tasks until cancelled, after :meth:`prepare`. The caller owns this task."""
        async with owned_tasks() as group:
            group.start_soon(self._find_what_others_made)
            await self._feeds.run()

    async def _find_what_others_made(self) -> None:
        """Pull from new streams of parked tasks, too: another control role made them, and may be gone."""
        while True:
            await anyio.sleep(self._look_s)
            try:
                await self._find_parked(await self._keeper.session(_SESSION_S))
            except (BusError, UnreachableError) as error:
                _log.info("whether there are more parked tasks is looked at later: %s", error)

    async def _find_parked(self, session: Session) -> None:
        for stream in await _streams_of(session, f"aw.{Family.PARK}.>"):
            if stream.startswith(_PARKED):
                self._feeds.add(ConsumerSpec(stream, PARKED_CONSUMER, {}))

    # --- what comes --------------------------------------------------------------------------------------

    async def _take(self, stream: str, delivery: Delivery) -> None:
        """Deal with one delivery; nothing is acknowledged before what follows from it stands."""
        try:
            if stream == self._wakeups.name:
                await self._woken(delivery)
            else:
                await self._parked(Place(stream, delivery.sequence), delivery)
        except NotBroughtBackError as error:  # only with ``later``
            _log.warning("a parked task can't be verified yet: %s", error)
            await self._back(delivery)
        except (AgentWeaveError, TimeoutError) as error:
            _log.warning("a parked task is looked at again later: %s", error)
            await self._back(delivery)
        else:
            await self._acknowledgements.done(delivery)

    async def _parked(self, place: Place, delivery: Delivery) -> None:
        """Plan when to look at what was parked just now."""
        task = await self._opened(place, delivery)
        if task is None:
            return
        if await self._admitted(place, delivery, task):
            await self._plan(place, task.first_ms)
        else:
            await self._forget(place)

    async def _admitted(self, place: Place, delivery: Delivery, task: ParkedTask) -> bool:
        """Say whether there is room for one more of its sender's; that there is none is put on record."""
        holding = _holding(task, delivery, task.first_ms)
        before = self._shares.elsewhere(place, holding)
        if before is not None and await self._read(before[0]) is None:
            self._shares.release(before[0])
            before = None
        if before is not None and before[1].covers(holding):
            return False
        refusal = self._shares.refusal(place, holding, self._clock_ms())
        if refusal is not None and before is None:  # else the task itself stands, and goes on
            why = NotBroughtBackError(refusal, opened=task.opened)
            await self._give_up(task.ref.agent, delivery, why)
        return refusal is None

    async def _woken(self, delivery: Delivery) -> None:
        """Bring back what is due."""
        place = self._place_of(delivery.subject)
        stands = await self._read(place)
        if stands is None:
            self._shares.release(place)
            return  # done with
        delivery = stands._replace(delivered=delivery.delivered, acknowledgement=delivery.acknowledgement)
        task = await self._opened(place, delivery)
        if task is None:
            return
        desk = self._desk(task.ref.agent)
        log = TaskLog(desk, task.ref)
        await log.refresh()
        if log.ended or (log.last is not None and task.times is None):
            await self._forget(place)
            return
        now_ms = self._clock_ms()
        if (due_ms := task.due_by(now_ms)) is not None:
            await self._bring_back(desk, task, due_ms)
        following = task.due_after(now_ms)
        if following is None:
            await self._forget(place)
        else:
            self._shares.hold(place, _holding(task, delivery, following))
            await self._plan(place, following)

    async def _opened(self, place: Place, delivery: Delivery) -> ParkedTask | None:
        """Verify what is parked; what is not brought back is put on record, and ``None`` returned."""
        agent: SpiffeID | None = None
        try:
            agent = agent_of_parked(delivery.subject, place.stream)
            self._desk(agent)
            return open_parked(
                self._verifier,
                delivery.data,
                agent=agent,
                subject=delivery.subject,
                stored_at_ms=delivery.stored_at_ms,
                now_ms=self._clock_ms(),
            )
        except NotBroughtBackError as error:
            assert agent is not None
            if error.later and delivery.delivered < _UNREADABLE_DELIVERIES:
                raise
            await self._give_up(agent, delivery, error)
        except MalformedEnvelopeError as error:
            _log.error("something is not where parked tasks stand: %s", error)
        await self._forget(place)
        return None

    async def _give_up(self, agent: SpiffeID, delivery: Delivery, why: NotBroughtBackError) -> None:
        """Put on record that a task is not brought back."""
        _log.warning("a task that was parked for %s is given up: %s", agent, why)
        desk, opened = self._desk(agent), why.opened
        if opened is None:
            await self._dead_letters_of(agent, desk).write(delivery, str(why))
            return
        head = opened.head
        log = TaskLog(desk, TaskRef(agent, head.iss, head.cap, head.id))
        await log.refresh()
        # Of a recurring task only the occurrences run, so its end is no failure.
        if log.last is None and not (head.every is not None and why.state is TaskState.FAILED):
            body = RecordBody(state=why.state, pd=head.pd.hex(), message=str(why)[:_MAX_MESSAGE], step="park")
            await log.append(body, opened.digest)

    # --- bringing back -----------------------------------------------------------------------------------

    async def _bring_back(self, desk: Desk, task: ParkedTask, due_ms: int) -> None:
        """Queue a reissue of what is due, unless it has been begun already."""
        head = task.opened.head
        task_id = head.id if task.times is None else occurrence_id(head.id, due_ms)
        if task.times is not None:
            log = TaskLog(desk, TaskRef(task.ref.agent, head.iss, head.cap, task_id))
            await log.refresh()
            if log.last is not None:
                return
        sealed = await self._sealed(desk.sealer, task, task_id, due_ms)
        session = await self._keeper.session(_SESSION_S)
        answer = await session.ask(sealed.head.sub, sealed.frame, timeout_s=_ANSWER_S)
        outcome = acknowledged(answer, tasks_stream_name(task.ref.agent))
        if outcome is not SlotOutcome.WRITTEN:
            raise BusError(f"{task.ref!r} is due and can't be queued: {outcome.value}")
        _log.info("%r is due and was queued as %s", task.ref, task_id)

    async def _sealed(self, sealer: Sealer, task: ParkedTask, task_id: str, due_ms: int) -> Sealed:
        opened, head, now_ms = task.opened, task.opened.head, self._clock_ms()
        exp = head.exp if task.times is None else min(head.exp, due_ms + OCCURRENCE_S * 1000)
        draft = reissue_draft(head, task_id=task_id, now_ms=now_ms, expires_ms=exp, nbf=due_ms)
        return await sealer.seal(draft, opened.payload, (*opened.via, opened.link))

    def _dead_letters_of(self, agent: SpiffeID, desk: Desk) -> DeadLetters:
        """Return one and the same for each agent: it counts how many that nobody signed have been written."""
        known = self._dead_letters.get(agent)
        if known is None:
            known = self._dead_letters[agent] = DeadLetters(agent, desk, self._on_given_up)
        return known

    def _desk(self, agent: SpiffeID) -> Desk:
        sealer = self._sealer_of(agent)
        if sealer is None:
            raise BusError(f"nothing can be signed for {agent} now")
        return Desk(self._slots, sealer, self._verifier, self._clock_ms, lambda: None)

    # --- at the broker -----------------------------------------------------------------------------------

    async def _plan(self, place: Place, due_ms: int) -> None:
        """Have the broker say when a parked task is due; planned twice, the later plan stands."""
        token = place.stream.removeprefix(_PARKED)
        headers = {
            "Nats-Schedule": f"@at {_rfc3339(due_ms)}",
            "Nats-Schedule-Target": wakeup_subject(self._domain, "due", token, place.number),
        }
        session = await self._keeper.session(_SESSION_S)
        subject = wakeup_subject(self._domain, "plan", token, place.number)
        answer = await session.ask(subject, b"", headers=headers, timeout_s=_ANSWER_S)
        if acknowledged(answer, self._wakeups.name) is not SlotOutcome.WRITTEN:
            raise BusError(f"no wake-up could be planned: {answer.data[:200]!r}")

    def _place_of(self, subject: str) -> Place:
        stage, _, rest = subject.removeprefix(f"{wakeups_prefix(self._domain)}.").partition(".")
        token, _, number = rest.partition(".")
        if stage != "due" or not number.isdecimal():
            raise BusError(f"{subject} is no wake-up")
        return Place(_PARKED + token, int(number))

    async def _read(self, place: Place) -> Delivery | None:
        """Read what is parked; ``None`` when it is no more."""
        answer = await self._api(f"STREAM.MSG.GET.{place.stream}", {"seq": place.number})
        if (error := answer.get("error")) is not None:
            if error.get("err_code") in (_NO_MESSAGE, _NO_STREAM):
                return None
            raise BusError(f"what is parked in {place} can't be read: {error.get('description')}")
        try:
            stored = answer["message"]
            data = base64.b64decode(stored["data"], validate=True)
            stored_ms = nanoseconds_of(stored["time"]) // 1_000_000
            if stored["seq"] == place.number:
                return Delivery(data, str(stored["subject"]), 1, stored_ms, "", place.number)
        except (KeyError, TypeError, ValueError) as error:
            raise BusError(f"what is parked in {place} can't be read: {error}") from error
        raise BusError(f"the broker answers with another message than {place}")

    async def _forget(self, place: Place) -> None:
        """Delete what is parked, which nobody needs any more; what can't be deleted goes with its age."""
        self._shares.release(place)
        body = {"seq": place.number, "no_erase": True}
        answer = await self._api(f"STREAM.MSG.DELETE.{place.stream}", body)
        if "error" in answer:
            _log.info("what was parked in %s is not deleted: %s", place, answer["error"].get("description"))

    async def _api(self, verb: str, body: dict[str, Any]) -> dict[str, Any]:
        session = await self._keeper.session(_SESSION_S)
        message = await session.ask(f"$JS.API.{verb}", json.dumps(body).encode(), timeout_s=_ANSWER_S)
        try:
            return dict(json.loads(message.data))
        except (ValueError, TypeError) as error:
            raise BusError(f"no answer on {verb}") from error

    async def _back(self, delivery: Delivery) -> None:
        delay_s = min(_LONGEST_PAUSE_S, 2.0 ** min(delivery.delivered - 1, 10))
        await self._acknowledgements.back(delivery, delay_s)


def _holding(task: ParkedTask, delivery: Delivery, due_ms: int) -> Holding:
    head = task.opened.head
    recurring = task.times is not None
    return Holding(str(head.iss), task.ref.key, len(delivery.data), due_ms, head.exp, recurring)


def _rfc3339(time_ms: int) -> str:
    seconds, rest = divmod(time_ms, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:03d}Z"


async def _streams_of(session: Session, subject: str) -> list[str]:
    """Return the names of all streams for ``subject``. Raises BusError."""
    names: list[str] = []
    while True:
        body = json.dumps({"subject": subject, "offset": len(names)}).encode()
        try:
            answer = json.loads((await session.ask("$JS.API.STREAM.NAMES", body, timeout_s=_ANSWER_S)).data)
        except (TimeoutError, ValueError) as error:
            raise BusError("the broker does not say which streams there are") from error
        found = answer.get("streams") or []
        names += found
        if not found or len(names) >= answer.get("total", 0):
            return names
