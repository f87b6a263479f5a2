"""What the broker's answer to a claim means. Whatever is not clearly a yes runs nothing."""

from __future__ import annotations

import asyncio
import json
import time

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
    """Tells when the stream was made, as often as it is asked."""

    def __init__(self, *created):
        self.created, self.asked = list(created), 0

    async def session(self, _timeout_s):
        return self

    async def ask(self, _subject, _data, *, timeout_s):
        assert timeout_s > 0
        self.asked += 1
        await asyncio.sleep(0)
        created = self.created.pop(0) if len(self.created) > 1 else self.created[0]
        return Message(json.dumps({"created": created}).encode())


def claims_at(*created):
    return Claims(SpiffeID("spiffe://a.test/agent/x"), Broker(*created))


def answered(value, claims=None, stream=None):
    """Return a claim that was answered with ``value``, of a call measured by the age ``stream``."""
    claims = claims or claims_at(EARLY)
    if claims._created_ms is None:
        claims._created_ms = EARLY_MS
    answer = asyncio.get_running_loop().create_future()
    answer.set_result(Message(value if isinstance(value, bytes) else json.dumps(value).encode()))
    return PendingClaim(claims, answer, stream or claims._created_ms)


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
    await claims.on_session(broker)
    assert await answered({"seq": 103}, claims).outcome() is ClaimOutcome.HELD
    assert broker.asked == asked + 2


async def test_many_first_claims_at_once_ask_once_and_all_hold():
    claims = claims_at(EARLY)
    await claims.on_session(claims._keeper)
    outcomes = await asyncio.gather(*(answered({"seq": n}, claims).outcome() for n in range(1, 100)))
    assert set(outcomes) == {ClaimOutcome.HELD}
    assert claims._keeper.asked <= 3


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
    assert await PendingClaim(mine, silent).outcome() is ClaimOutcome.UNAVAILABLE
    lost = asyncio.get_running_loop().create_future()
    lost.set_exception(BusError("gone"))
    assert await PendingClaim(mine, lost).outcome() is ClaimOutcome.UNAVAILABLE
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
