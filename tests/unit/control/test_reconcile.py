"""Streams and consumers are made, updated or refused; never deleted. A table of answers plays the broker."""

from __future__ import annotations

import json

import pytest

from agentweave_bus.bus.streams import claim_stream, task_consumer
from agentweave_bus.control.reconcile import reconcile_consumers, reconcile_streams
from agentweave_bus.exceptions import BusError, ConfigurationError
from agentweave_bus.spiffe_id import SpiffeID

pytestmark = pytest.mark.anyio

SPEC = claim_stream(SpiffeID("spiffe://x.test/agent/a"))
INFO, CREATE, UPDATE = (f"$JS.API.STREAM.{verb}.{SPEC.name}" for verb in ("INFO", "CREATE", "UPDATE"))
CONSUMER = task_consumer(SpiffeID("spiffe://x.test/agent/a"), "pay")
PLACE = f"{CONSUMER.stream}.{CONSUMER.name}"
TELL, MAKE = f"$JS.API.CONSUMER.INFO.{PLACE}", f"$JS.API.CONSUMER.CREATE.{PLACE}"
NO_CONSUMER = {"error": {"code": 404, "err_code": 10014, "description": "consumer not found"}}
MISSING = {"error": {"code": 404, "err_code": 10059, "description": "stream not found"}}


class Broker:
    """Answers each subject as it is told, and keeps what it was asked. (A real one: tests/integration.)"""

    def __init__(self, answers):
        self.answers = answers
        self.asked = []

    async def ask(self, subject, data, *, headers=None, timeout_s):
        self.asked.append((subject, json.loads(data) if data else None))
        answer = self.answers[subject]
        if isinstance(answer, Exception):
            raise answer

        class Message:
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()

        return Message


async def test_a_missing_one_is_made():
    broker = Broker({INFO: MISSING, CREATE: {"config": {}}})
    assert await reconcile_streams(broker, [SPEC]) == [SPEC.name]
    assert broker.asked == [(INFO, None), (CREATE, SPEC.config)]


async def test_an_equal_one_is_left_alone():
    told = {key: value for key, value in SPEC.config.items() if value} | {"max_consumers": -1}
    broker = Broker({INFO: {"config": told}})
    assert await reconcile_streams(broker, [SPEC]) == []
    assert broker.asked == [(INFO, None)]


async def test_where_only_what_is_there_counts_none_is_made():
    broker = Broker({INFO: MISSING})
    assert await reconcile_streams(broker, [SPEC], make=False) == []
    assert broker.asked == [(INFO, None)]


async def test_what_a_cluster_can_not_do_now_may_be_asked_for_again():
    refusal = {"error": {"code": 400, "err_code": 10005, "description": "no suitable peers, peer offline"}}
    with pytest.raises(BusError, match=f"{SPEC.name} now: no suitable peers"):
        await reconcile_streams(Broker({INFO: MISSING, CREATE: refusal}), [SPEC])


@pytest.mark.parametrize(
    "change", [{"deny_delete": False}, {"max_msgs_per_subject": 2}, {"allow_rollup_hdrs": True}]
)
async def test_another_one_is_brought_in_line(change):
    broker = Broker({INFO: {"config": SPEC.config | change}, UPDATE: {"config": {}}})
    assert await reconcile_streams(broker, [SPEC]) == []
    assert broker.asked[-1] == (UPDATE, SPEC.config)


async def test_what_can_not_be_changed_is_an_error_that_quotes_the_broker():
    refusal = {"error": {"err_code": 10052, "description": "can not cancel deny message deletes"}}
    broker = Broker({INFO: {"config": SPEC.config | {"deny_delete": False}}, UPDATE: refusal})
    with pytest.raises(ConfigurationError, match=f"{SPEC.name}.*can not cancel deny message deletes"):
        await reconcile_streams(broker, [SPEC])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (TimeoutError(), "does not answer"),
        (b"", "JetStream is not available"),
        ([], "not understood"),
        ({"error": {"err_code": 10039, "description": "jetstream not enabled"}}, "jetstream not enabled"),
    ],
    ids=["silence", "empty", "list", "error"],
)
async def test_a_broker_without_streams_is_an_error(answer, said):
    with pytest.raises(BusError, match=said):
        await reconcile_streams(Broker({INFO: answer}), [SPEC])


def asked_to(action):
    return (MAKE, {"stream_name": CONSUMER.stream, "config": CONSUMER.config, "action": action})


async def test_a_missing_consumer_is_made():
    broker = Broker({TELL: NO_CONSUMER, MAKE: {"config": {}}})
    assert await reconcile_consumers(broker, [CONSUMER]) == [CONSUMER.name]
    assert broker.asked == [(TELL, None), asked_to("create")]


async def test_a_consumer_to_which_the_broker_added_what_was_left_open_is_left_alone():
    more = {"max_waiting": 512, "metadata": CONSUMER.config["metadata"] | {"_nats.ver": "2.15.1"}}
    broker = Broker({TELL: {"config": CONSUMER.config | more}})
    assert await reconcile_consumers(broker, [CONSUMER]) == []
    assert broker.asked == [(TELL, None)]


@pytest.mark.parametrize("change", [{"ack_wait": 1}, {"max_deliver": 3}, {"metadata": {}}])
async def test_another_consumer_is_brought_in_line(change):
    broker = Broker({TELL: {"config": CONSUMER.config | change}, MAKE: {"config": {}}})
    assert await reconcile_consumers(broker, [CONSUMER]) == []
    assert broker.asked[-1] == asked_to("update")


@pytest.mark.parametrize(
    ("told", "hint"),
    [({"config": CONSUMER.config | {"deliver_policy": "new"}}, "made anew"), (NO_CONSUMER, "too many")],
    ids=["changed", "made"],
)
async def test_a_consumer_that_can_not_be_had_is_an_error_that_says_what_to_do(told, hint):
    refusal = {"error": {"err_code": 10012, "description": "deliver policy can not be updated"}}
    broker = Broker({TELL: told, MAKE: refusal})
    with pytest.raises(ConfigurationError, match="deliver policy can not be updated") as error:
        await reconcile_consumers(broker, [CONSUMER])
    assert CONSUMER.name in str(error.value)
    assert hint in str(error.value.hint)


async def test_a_consumer_of_no_stream_is_the_brokers_fault():
    with pytest.raises(BusError, match="stream not found"):
        await reconcile_consumers(Broker({TELL: MISSING}), [CONSUMER])
