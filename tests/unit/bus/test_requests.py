"""How often and for how long a call is made again. Time and the broker's word are played."""

from __future__ import annotations

import time
from types import SimpleNamespace

import anyio
import pytest

from agentweave_bus.bus.requests import Request, Requests, RetryRule
from agentweave_bus.exceptions import CallTimeoutError, NoResponderError
from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.spiffe_id import SpiffeID

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

    async def publish(self, subject, _data, reply):
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
        self.ids.append(draft.id)
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
        with anyio.fail_after(5):
            return await self.requests.call(request)


async def test_who_reaches_nobody_tries_for_as_long_as_its_patience_with_one_id():
    setup = Setup(patience=0.4)
    with pytest.raises(NoResponderError):
        await setup.call(60)
    sent = setup.session.sent
    assert 0.35 <= sent[-1] - sent[0] < 2
    assert len(sent) > 3  # more often than bus.retry.attempts
    assert len(set(setup.sealer.ids)) == 1


async def test_patience_ends_before_the_deadline_and_it_is_still_said_that_nobody_was_there():
    setup = Setup(patience=60.0)
    began = time.monotonic()
    with pytest.raises(NoResponderError):
        await setup.call(0.3)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("hours", [-1, 1])
async def test_a_clock_that_is_set_neither_prolongs_nor_ends_a_call(hours):
    """The callee is silent; the clock jumps while the first attempt waits for its answer."""
    setup = Setup(silent=True)
    began = time.monotonic()

    async def jump(_sealed):
        setup.now_ms = NOW_MS + hours * 3_600_000

    with pytest.raises(CallTimeoutError):
        await setup.call(0.5, safe=True, on_sealed=jump)
    assert 0.45 < time.monotonic() - began < 2
    assert len(setup.session.sent) == 3


def test_delays_double_up_to_the_last_and_any_number_of_them_can_be_had():
    rule = RetryRule(first_delay=0.1, last_delay=1.0)
    for attempt, most in ((1, 0.1), (2, 0.2), (3, 0.4), (9, 1.0), (5000, 1.0)):
        assert most / 2 <= rule.delay(attempt) <= most
