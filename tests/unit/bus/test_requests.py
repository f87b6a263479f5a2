"""How often and for how long a call is made again. Time and the broker's word are played."""

from __future__ import annotations

import time
from types import SimpleNamespace

import anyio
import pytest

from agentweave_bus.bus.requests import Request, Requests, RetryRule, _refusal
from agentweave_bus.envelope import Kind, decode_frame, encode_payload, head_digest, new_id, parse_head
from agentweave_bus.exceptions import CallRefusedError, CallTimeoutError, NoResponderError
from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.spiffe_id import SpiffeID
from tests.unit.envelope.world import CLIENT, NOW, ORDER, World, draft

pytestmark = pytest.mark.anyio

ME, CALLEE = SpiffeID("spiffe://a.test/client/me"), SpiffeID("spiffe://a.test/agent/x")
NOW_MS = 1_700_000_000_000


class Session:
    """A connection on which nobody takes anything; silent, it does not even say so."""

    me, instance, max_message_bytes = ME, "i" * 22, 1 << 20

    def __init__(self, *, silent):
        self.silent, self.sent = silent, []

    def watch(self, _future):
        pass

    unwatch = watch

    async def publish_within(self, _timeout_s, subject, _data, reply):
        self.sent.append(time.monotonic())
        if not self.silent:
            nobody = SimpleNamespace(subject=reply, data=b"", headers={"Status": "503"})
            await self.on_reply(nobody)

    async def receive_replies(self, handler):
        self.on_reply = handler


class Keeper:
    def __init__(self, session):
        self._session, self.waits = session, []

    def on_session(self, listener):
        self.listener = listener

    def on_permission_error(self, _listener):
        pass

    async def session(self, timeout_s):
        self.waits.append(timeout_s)
        return self._session


class Sealer:
    def __init__(self):
        self.ids = []

    async def seal(self, draft, _payload, _via):
        self.ids.append(draft["id"])
        return SimpleNamespace(frame=b"frame", digest=str(len(self.ids)).encode())


class Setup:
    def __init__(self, *, silent=False, **rule):
        self.now_ms = NOW_MS
        self.session, self.sealer = Session(silent=silent), Sealer()
        self.keeper = Keeper(self.session)
        self.requests = Requests(
            keeper=self.keeper,
            sealer=self.sealer,
            verifier=None,
            retry=RetryRule(first_delay=0.01, last_delay=0.05, **rule),
            metrics=Metrics.create(),
            clock_ms=lambda: self.now_ms,
            witness=lambda: None,
            max_pending=8,
        )

    async def call(self, seconds, **options):
        await self.keeper.listener(self.session)
        request = Request(
            callee=CALLEE,
            capability="do",
            payload=b"",
            deadline_ms=NOW_MS + int(seconds * 1000),
            **options,
        )
        with anyio.fail_after(30):
            return await self.requests.call(request)


async def test_who_reaches_nobody_tries_for_as_long_as_its_patience_with_one_id():
    setup = Setup(patience=0.4)
    with pytest.raises(NoResponderError):
        await setup.call(60)
    sent = setup.session.sent
    assert 0.35 <= sent[-1] - sent[0] < 20
    assert len(sent) > 3  # more often than bus.retry.attempts
    assert len(set(setup.sealer.ids)) == 1


async def test_patience_ends_before_the_deadline_and_it_is_still_said_that_nobody_was_there():
    setup = Setup(patience=60.0)
    began = time.monotonic()
    with pytest.raises(NoResponderError):
        await setup.call(0.3)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_clock_that_is_set_neither_prolongs_nor_ends_a_call(hours):
    """The callee is silent; the clock jumps while the first attempt waits for its answer."""
    setup = Setup(silent=True)
    began = time.monotonic()

    async def jump(_sealed):
        setup.now_ms = NOW_MS + hours * 3_600_000

    with pytest.raises(CallTimeoutError):
        await setup.call(0.5, safe=True, on_sealed=jump)
    assert 0.45 < time.monotonic() - began < 20
    assert len(setup.session.sent) == 3


def test_delays_double_up_to_the_last_and_any_number_of_them_can_be_had():
    rule = RetryRule(first_delay=0.1, last_delay=1.0)
    for attempt, most in ((1, 0.1), (2, 0.2), (3, 0.4), (9, 1.0), (5000, 1.0)):
        assert most / 2 <= rule.delay(attempt) <= most


NOBODY = "nobody"
COME_AGAIN = {"step": "replay", "reason": "not ready", "audit_id": "a", "retry_after": 0.01}
NO = {"step": "payload", "reason": "wrong", "audit_id": "a"}


class Answering(Session):
    """A connection on which each attempt meets what is written for it, in one turn: (which attempt, answer)."""

    me = CLIENT

    def __init__(self, world, *script):
        super().__init__(silent=True)
        self.world, self.script = world, script
        self.heads, self.replies = [], []

    async def publish_within(self, timeout_s, subject, data, reply):
        await super().publish_within(timeout_s, subject, data, reply)
        self.heads.append(decode_frame(data).head)
        for attempt, answer in self.script[len(self.heads) - 1]:
            await self.on_reply(self.message(reply, self.heads[attempt], answer))
        self.replies.append(reply)

    def message(self, reply, asked, answer):
        if answer is NOBODY:
            return SimpleNamespace(subject=reply, data=b"", headers={"Status": "503"})
        head = parse_head(asked)
        kind = Kind.REFUSAL if "step" in answer else Kind.REPLY
        said = draft(CLIENT, head.cap, kind=kind, sub=reply, re=head_digest(asked), id=new_id(NOW))
        frame = self.world.sealer(ORDER).seal_now(said, encode_payload(answer), ()).frame
        return SimpleNamespace(subject=reply, data=frame, headers=None)


class Caller:
    """One that asks ``ORDER``; envelopes and their verification are real."""

    def __init__(self, *script, **rule):
        world = World()
        self.session = Answering(world, *script)
        self.metrics = Metrics.create()
        self.keeper = Keeper(self.session)
        self.requests = Requests(
            keeper=self.keeper,
            sealer=world.sealer(CLIENT),
            verifier=world.verifier(),
            retry=RetryRule(**{"first_delay": 0.01, "last_delay": 0.05} | rule),
            metrics=self.metrics,
            clock_ms=lambda: NOW,
            witness=lambda: None,
            max_pending=8,
        )

    async def call(self):
        await self.keeper.listener(self.session)
        with anyio.fail_after(30):
            return await self.requests.call(Request(ORDER, "do", encode_payload({}), NOW + 4_000))

    @property
    def duplicates(self):
        return self.metrics.registry.get_sample_value(
            "agentweave_replies_dropped_total", {"reason": "duplicate"}
        )


async def test_in_doubt_a_reply_counts_beside_the_refusal_of_another_attempt():
    caller = Caller([(0, NOBODY)], [(1, COME_AGAIN), (0, {"n": 1})])
    assert (await caller.call()).value == {"n": 1}
    assert len(caller.session.sent) == 2
    assert caller.duplicates == 0


async def test_in_doubt_the_first_of_two_replies_counts():
    caller = Caller([(0, NOBODY)], [(1, {"n": 1}), (0, {"n": 2})])
    assert (await caller.call()).value == {"n": 1}
    assert caller.duplicates == 1


async def test_without_doubt_nothing_counts_beside_a_refusal():
    caller = Caller([(0, NO), (0, {"n": 1})])
    with pytest.raises(CallRefusedError, match="wrong"):
        await caller.call()
    assert caller.duplicates == 1


async def test_what_is_no_answer_ends_no_pause():
    """The broker says twice that nobody was there; the second time while the next attempt is waited for."""
    caller = Caller([(0, NOBODY)], [(1, {"n": 1})], first_delay=0.2, last_delay=0.2)
    session = caller.session
    async with anyio.create_task_group() as group:
        group.start_soon(caller.call)
        await anyio.wait_all_tasks_blocked()
        while len(session.replies) < 1:  # what is sealed is sealed in a later turn
            await anyio.sleep(0.001)
            await anyio.wait_all_tasks_blocked()
        await session.on_reply(session.message(session.replies[0], session.heads[0], NOBODY))
    first, second = session.sent
    assert second - first >= 0.1  # half of the delay, at least


@pytest.mark.parametrize("step", ["authorization", "input"])
def test_a_callee_s_words_are_one_line_of_bounded_length(step):
    def refused(**body):
        body = {"step": step, "reason": "no", "audit_id": "a-1"} | body
        opened = SimpleNamespace(head=SimpleNamespace(iss=CALLEE, cap="pay"), payload=encode_payload(body))
        return _refusal(opened, body, in_doubt=False)

    forged = "no\nagentweave: all is well\r\x1b[2K\u2028\u202e"
    for error in (refused(reason=forged), refused(audit_id=forged)):
        assert "no\\nagentweave: all is well" in str(error).replace("\\x0a", "\\n")
        assert all(character.isprintable() for character in str(error))
    assert "\n" not in refused(reason=forged).reason
    assert "\n" not in refused(audit_id=forged).audit_id
    assert len(str(refused(reason="\n" * 100_000, audit_id="x" * 100_000))) < 2_200
    assert refused(reason="x" * 1_000).reason == "x" * 1_000
    assert refused(reason="x" * 1_001).reason == "x" * 999 + "…"


def test_a_step_that_is_made_up_writes_no_line_of_its_own():
    body = {"step": "input\nagentweave: all is well" + "x" * 100_000}
    opened = SimpleNamespace(head=SimpleNamespace(iss=CALLEE, cap="pay"), payload=encode_payload(body))
    error = _refusal(opened, body, in_doubt=False)
    assert "\n" not in str(error) + error.step
    assert len(str(error)) < 1_200
