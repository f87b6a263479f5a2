"""What the broker's answer to a claim means. Whatever is not clearly a yes runs nothing."""

from __future__ import annotations

import asyncio
import json
import time

import anyio
import pytest

from agentweave_bus.bus import claims
from agentweave_bus.bus.claims import ClaimOutcome, Claims, PendingClaim
from agentweave_bus.bus.streams import claim_stream, claim_stream_name
from agentweave_bus.envelope import DEFAULT_LIMITS
from agentweave_bus.exceptions import BusError
from agentweave_bus.spiffe_id import SpiffeID

pytestmark = pytest.mark.anyio


class Message:
    def __init__(self, data):
        self.data = data


class Broker:
    """Tells when the stream was made, as often as it is asked: keeper and its first session in one."""

    def __init__(self, *created):
        self.created, self.asked = list(created), 0
        self.speaks = asyncio.Event()
        self.speaks.set()
        self.lost = False
        self.questions = asyncio.Queue()
        self.current = self

    async def session(self, _timeout_s):
        return self.current

    async def ask(self, _subject, _data, *, timeout_s):
        assert timeout_s > 0
        self.asked += 1
        self.questions.put_nowait(self.asked)
        await asyncio.sleep(0)
        await asyncio.wait_for(self.speaks.wait(), timeout_s)
        if self.lost:
            raise BusError("gone")
        created = self.created.pop(0) if len(self.created) > 1 else self.created[0]
        return Message(json.dumps({"created": created}).encode())


def claims_at(*created):
    return Claims(SpiffeID("spiffe://a.test/agent/x"), Broker(*created))


def answered(value, claims=None, stream=None):
    """Return a claim that was answered with ``value``, of a call measured by the age ``stream``.

    It was sent on the session that is the current one now.
    """
    claims = claims or claims_at(EARLY)
    if claims._created_ms is None:
        claims._created_ms = EARLY_MS
    answer = asyncio.get_running_loop().create_future()
    answer.set_result(Message(value if isinstance(value, bytes) else json.dumps(value).encode()))
    age = claims._age_by(claims._keeper.current)
    return PendingClaim(claims, answer, stream or claims._created_ms, age)


EARLY, LATE = "2026-01-02T03:04:05Z", "2026-01-02T04:00:00Z"
EARLY_MS = 1_767_323_045_000
FULL_SUBJECT = "maximum messages per subject exceeded"


async def test_a_fresh_acknowledgement_holds_it():
    assert await answered({"stream": "s", "seq": 7}).outcome() is ClaimOutcome.HELD


@pytest.mark.parametrize(
    "error",
    [{"err_code": 10071, "description": "wrong"}, {"err_code": 10077, "description": FULL_SUBJECT}],
    ids=["wrong sequence", "subject full"],
)
async def test_two_errors_mean_that_somebody_holds_it(error):
    assert await answered({"error": {"code": 400, **error}}).outcome() is ClaimOutcome.CLAIMED


@pytest.mark.parametrize("description", ["maximum bytes exceeded", "maximum messages exceeded", "", None])
async def test_a_full_stream_accuses_nobody_of_a_replay(description):
    answer = {"error": {"code": 503, "err_code": 10077, "description": description}}
    assert await answered(answer).outcome() is ClaimOutcome.UNAVAILABLE


async def test_a_sequence_that_starts_anew_in_another_stream_runs_nothing():
    claims = claims_at(EARLY, EARLY, LATE)
    assert await claims.created_ms(time.time_ns() // 1_000_000) is not None
    assert await answered({"seq": 100}, claims).outcome() is ClaimOutcome.HELD
    assert await answered({"seq": 1}, claims).outcome() is ClaimOutcome.UNAVAILABLE
    assert await answered({"seq": 2}, claims).outcome() is ClaimOutcome.HELD  # the new stream is known now


async def test_the_first_claim_of_a_session_is_measured_by_an_age_asked_for_after_it():
    claims = claims_at(EARLY, LATE)
    broker = claims._keeper
    await claims.on_session(broker)
    assert await answered({"seq": 100}, claims).outcome() is ClaimOutcome.UNAVAILABLE
    assert await answered({"seq": 101}, claims).outcome() is ClaimOutcome.HELD
    asked = broker.asked
    assert await answered({"seq": 102}, claims).outcome() is ClaimOutcome.HELD
    assert broker.asked == asked  # it knows by then
    broker.current = new = Broker(LATE)
    await claims.on_session(new)
    assert await answered({"seq": 103}, claims).outcome() is ClaimOutcome.HELD
    assert (broker.asked, new.asked) == (asked, 2)


async def test_many_first_claims_at_once_ask_once_and_all_hold():
    claims = claims_at(EARLY)
    await claims.on_session(claims._keeper)
    outcomes = await asyncio.gather(*(answered({"seq": n}, claims).outcome() for n in range(1, 100)))
    assert set(outcomes) == {ClaimOutcome.HELD}
    assert claims._keeper.asked <= 3


async def test_a_claim_of_the_old_session_says_nothing_of_the_stream_that_the_new_one_leads_to():
    claims = claims_at(EARLY)
    old, new = claims._keeper, Broker(EARLY)
    await claims.on_session(old)
    new.speaks.clear()
    opening = asyncio.create_task(claims.on_session(new))
    await until_asked(new)
    assert await answered({"seq": 100}, claims).outcome() is ClaimOutcome.HELD  # while the new one opens
    new.speaks.set()
    await opening
    old.current = new
    new.created = [LATE]  # made anew since, and grown beyond what the old one had
    assert await answered({"seq": 101}, claims).outcome() is ClaimOutcome.UNAVAILABLE


async def test_a_claim_under_way_is_clear_whatever_the_session_that_opens_meanwhile_says_of_itself():
    claims = claims_at(EARLY)
    old, new = claims._keeper, Broker(EARLY)
    await claims.on_session(old)
    assert await answered({"seq": 1}, claims).outcome() is ClaimOutcome.HELD
    under_way, first_of_session = answered({"seq": 2}, claims), answered({"seq": 1}, claims)
    new.lost = True
    await claims.on_session(new)
    assert await under_way.outcome() is ClaimOutcome.HELD
    old.current, new.lost = new, False
    assert await answered({"seq": 3}, claims).outcome() is ClaimOutcome.HELD
    asked = new.asked
    assert await first_of_session.outcome() is ClaimOutcome.HELD  # its own session is asked about it
    assert await answered({"seq": 4}, claims).outcome() is ClaimOutcome.HELD
    assert new.asked == asked


async def test_a_retired_session_that_is_lost_makes_no_claim_of_the_current_one_unclear():
    claims = claims_at(EARLY)
    old, new = claims._keeper, Broker(EARLY)
    await claims.on_session(old)
    late = answered({"seq": 1}, claims)
    await claims.on_session(new)
    old.current, old.lost = new, True
    assert await answered({"seq": 2}, claims).outcome() is ClaimOutcome.HELD
    under_way = answered({"seq": 3}, claims)
    assert await late.outcome() is ClaimOutcome.UNAVAILABLE
    assert await under_way.outcome() is ClaimOutcome.HELD


async def test_a_broker_that_is_silent_about_the_age_keeps_no_session_from_opening():
    claims = claims_at(EARLY)
    claims._keeper.speaks.clear()
    with anyio.fail_after(20):
        await claims.on_session(claims._keeper)
    claims._keeper.speaks.set()
    assert await claims.created_ms(EARLY_MS) == EARLY_MS  # it is asked again when a call needs it


async def test_many_calls_that_need_the_age_at_once_ask_once():
    claims = claims_at(EARLY)
    ages = await asyncio.gather(*(claims.created_ms(EARLY_MS) for _ in range(100)))
    assert set(ages) == {EARLY_MS}
    assert claims._keeper.asked == 1


async def test_a_question_that_was_cancelled_is_no_answer_for_those_who_waited_for_it():
    claims = claims_at(EARLY)
    broker = claims._keeper
    assert await answered({"seq": 9}, claims).outcome() is ClaimOutcome.HELD
    broker.speaks.clear()
    asks = asyncio.create_task(answered({"seq": 1}, claims).outcome())
    await until_asked(broker, 2)
    # The question of these two has to begin after that one's: the second asks, and the third waits for it.
    second, third = (asyncio.create_task(answered({"seq": n}, claims).outcome()) for n in (2, 3))
    await asyncio.sleep(0)
    asks.cancel()
    await until_asked(broker, 3)
    second.cancel()
    broker.created = [LATE]
    broker.speaks.set()
    assert await third is ClaimOutcome.UNAVAILABLE


async def test_a_question_that_was_under_way_when_a_claim_was_made_is_no_answer_for_it():
    claims = claims_at(EARLY, LATE)
    two = [answered({"seq": n}, claims) for n in (1, 2)]
    outcomes = await asyncio.gather(*(one.outcome() for one in two))
    assert outcomes == [ClaimOutcome.HELD, ClaimOutcome.UNAVAILABLE]


async def test_a_stream_that_was_made_anew_is_confirmed_anew():
    claims = claims_at(EARLY)
    broker = claims._keeper
    assert await answered({"seq": 100}, claims).outcome() is ClaimOutcome.HELD
    broker.created = [LATE]
    assert await answered({"seq": 1}, claims).outcome() is ClaimOutcome.UNAVAILABLE
    broker.created = [EARLY]
    assert await answered({"seq": 2}, claims).outcome() is ClaimOutcome.UNAVAILABLE


async def until_asked(broker, times=1):
    with anyio.fail_after(30):
        while broker.asked < times:
            await broker.questions.get()


async def test_a_call_that_was_measured_by_another_age_runs_nothing():
    claims = claims_at(EARLY)
    assert await answered({"seq": 1}, claims).outcome() is ClaimOutcome.HELD
    assert await answered({"seq": 2}, claims, EARLY_MS - 1).outcome() is ClaimOutcome.UNAVAILABLE


async def test_acknowledgements_of_one_stream_may_be_judged_out_of_order():
    claims = claims_at(EARLY)
    assert await claims.created_ms(time.time_ns() // 1_000_000) is not None
    assert await answered({"seq": 100}, claims).outcome() is ClaimOutcome.HELD
    assert await answered({"seq": 99}, claims).outcome() is ClaimOutcome.HELD


@pytest.mark.parametrize(
    "value",
    [
        b"", b"\xff", b"{", [], 1, "yes", None, {}, {"seq": 0}, {"seq": "1"}, {"stream": "s"},
        {"stream": "s", "seq": 7, "duplicate": True}, {"error": {}}, {"error": {"err_code": 10076}},
        {"error": "full"}, {"error": {"err_code": "10077"}}, {"seq": 7, "error": {"err_code": 10023}},
    ],
    ids=repr,
)  # fmt: skip
async def test_anything_else_runs_nothing(value):
    assert await answered(value).outcome() is ClaimOutcome.UNAVAILABLE


async def test_silence_and_a_lost_connection_run_nothing(monkeypatch):
    monkeypatch.setattr(claims, "_TIMEOUT_S", 0.01)
    mine = claims_at(EARLY)
    silent = asyncio.get_running_loop().create_future()
    age = mine._age_by(mine._keeper)
    assert await PendingClaim(mine, silent, EARLY_MS, age).outcome() is ClaimOutcome.UNAVAILABLE
    lost = asyncio.get_running_loop().create_future()
    lost.set_exception(BusError("gone"))
    assert await PendingClaim(mine, lost, EARLY_MS, age).outcome() is ClaimOutcome.UNAVAILABLE
    assert await PendingClaim().outcome() is ClaimOutcome.UNAVAILABLE


async def test_an_abandoned_claim_is_waited_for_no_more():
    answer = asyncio.get_running_loop().create_future()
    PendingClaim(claims_at(EARLY), answer).abandon()
    assert answer.cancelled()


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        ("2026-01-02T03:04:05.123456789Z", "2026-01-02T03:04:05.123456+00:00"),
        ("2026-01-02T03:04:05.1Z", "2026-01-02T03:04:05.100000+00:00"),
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z"),
    ],
)
def test_the_brokers_times_are_read_to_the_microsecond(told, meant):
    assert claims._microseconds(told) == meant


def test_a_claim_stream_lets_nothing_be_taken_back():
    agent = SpiffeID("spiffe://a.test/agent/x")
    config = claim_stream(agent).config
    assert config["subjects"] == ["aw.claim.a=test.agent/x.*"]
    assert config["max_msgs_per_subject"] == 1
    assert config["max_msg_size"] == 32  # a digest, and no acknowledgement of the broker's
    assert config["max_age"] / 1e9 > DEFAULT_LIMITS.max_call_lifetime_ms / 1000 + 4
    assert (config["discard"], config["discard_new_per_subject"]) == ("new", True)
    assert config["deny_delete"] is config["deny_purge"] is True
    assert config["allow_rollup_hdrs"] is False
    assert not {"allow_msg_ttl", "allow_msg_schedules"} & {key for key, value in config.items() if value}
    assert config["storage"] == "file"
    name = claim_stream_name(agent)
    assert not set(name) & set("./ *>")
    assert name != claim_stream_name(SpiffeID("spiffe://a.test/agent/y"))
