"""Streams and consumers are declared so that no header, no agent and no second writer undoes what is kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.bus.stream_limits import StreamLimits
from agentweave_bus.bus.streams import (
    FILTER_KEY,
    PARKED_MAX_AGE_S,
    STATE_MAX_AGE_S,
    TASK_MAX_AGE_S,
    claim_stream,
    claim_stream_name,
    dead_stream,
    dead_stream_name,
    parked_stream,
    progress_stream,
    progress_stream_name,
    state_stream,
    state_stream_name,
    task_consumer,
    task_consumers,
    task_streams,
    tasks_stream,
    tasks_stream_name,
    wakeups_consumer,
    wakeups_stream,
)
from agentweave_bus.bus.subjects import (
    Priority,
    dead_subject,
    progress_subject,
    record_subject,
    step_subject,
    task_subject,
    wakeup_subject,
)
from agentweave_bus.envelope import DEFAULT_LIMITS
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.testing.memory_subjects import matches

A = SpiffeID("spiffe://x.test/agent/a")
B = SpiffeID("spiffe://x.test/agent/a/b")
KEY = "0a" * 32
EVERY = [claim_stream, tasks_stream, state_stream, progress_stream, dead_stream]
SLOTS = [state_stream, progress_stream, dead_stream]


@pytest.mark.parametrize("declare", EVERY)
def test_no_header_can_do_anything_and_nothing_is_removed(declare):
    config = declare(A).config
    assert config["deny_delete"] is True
    assert config["deny_purge"] is True
    for weapon in ("allow_rollup_hdrs", "allow_msg_ttl", "allow_msg_schedules"):
        assert not config.get(weapon)
    assert config["storage"] == "file"
    assert config["discard"] == "new"
    assert declare(A, limits=StreamLimits(replicas=3)).config["num_replicas"] == 3


@pytest.mark.parametrize("declare", SLOTS)
def test_a_slot_is_written_once_and_read_directly(declare):
    config = declare(A).config
    assert config["max_msgs_per_subject"] == 1
    assert config["discard_new_per_subject"] is True
    assert config["allow_direct"] is True


def test_what_is_parked_is_bounded_and_only_deleting_is_possible_which_no_agent_may():
    config = parked_stream(A).config
    queue = tasks_stream(A).config
    differs = {key for key in config.keys() | queue.keys() if config.get(key) != queue.get(key)}
    described = {"name", "description", "subjects"}
    assert differs - described == {"retention", "max_msgs", "max_bytes", "max_consumers", "deny_delete"}
    assert config["max_msgs"] > 0
    assert config["max_bytes"] > 0
    assert config["max_age"] == PARKED_MAX_AGE_S * 10**9 >= DEFAULT_LIMITS.max_lifetime_ms * 10**6


def test_schedules_are_allowed_where_no_agent_publishes_and_nothing_is_dropped_there_to_make_room():
    config = wakeups_stream("x.test").config
    assert config["allow_msg_schedules"] is True
    assert config["subjects"] == ["aw.wakeup.x=test.>"]
    assert not {"max_msgs", "max_bytes"} & config.keys()
    consumer = wakeups_consumer("x.test").config
    assert matches(consumer["filter_subject"], wakeup_subject("x.test", "due", "a", 1))
    assert not matches(consumer["filter_subject"], wakeup_subject("x.test", "plan", "a", 1))


def test_each_priority_has_a_consumer_of_its_own():
    consumers = task_consumers(A, "pay")
    assert [one.config["filter_subject"] for one in consumers] == [
        task_subject(A, "pay", priority) for priority in (Priority.HIGH, Priority.NORMAL, Priority.LOW)
    ]
    assert len({one.name for one in consumers}) == len(consumers)


def test_a_queue_is_bounded_and_nobody_reads_it_past_its_consumers():
    config = tasks_stream(A, limits=StreamLimits(queue_tasks=7, queue_bytes=1_000)).config
    assert (config["max_msgs"], config["max_bytes"]) == (7, 1_000)
    assert config["retention"] == "workqueue"
    assert config["allow_direct"] is False


def test_an_outcome_is_remembered_for_longer_than_its_task_can_come():
    assert DEFAULT_LIMITS.max_lifetime_ms <= TASK_MAX_AGE_S * 1000
    assert STATE_MAX_AGE_S > TASK_MAX_AGE_S


def test_each_subject_is_kept_in_the_stream_that_is_named_for_it():
    kept = {
        tasks_stream_name(A): task_subject(A, "pay"),
        state_stream_name(A): record_subject(A, B, KEY, 0),
        progress_stream_name(A): progress_subject(A, B, KEY, 0),
        dead_stream_name(A): dead_subject(A, "pay", KEY, 0, "frame"),
    }
    declared = {one.name: one for one in task_streams(A)}
    assert declared.keys() == kept.keys()
    for name, stream in declared.items():
        assert stream.config["name"] == name
        takes = [subject for subject in kept.values() if matches(stream.config["subjects"][0], subject)]
        assert takes == [kept[name]]
    assert matches(declared[state_stream_name(A)].config["subjects"][0], step_subject(A, KEY, "charge"))


def test_the_queue_comes_last_so_that_no_task_waits_whose_outcome_could_not_be_recorded():
    assert task_streams(A)[-1].name == tasks_stream_name(A)


def test_dead_letters_are_bounded_and_a_full_stream_forgets_none():
    config = dead_stream(A).config
    assert config["max_bytes"] > 0
    assert config["discard"] == "new"


@given(st.sampled_from([A, B]), st.sampled_from([A, B]))
def test_agents_share_no_stream(one, other):
    names = [claim_stream_name, tasks_stream_name, state_stream_name, progress_stream_name, dead_stream_name]
    assert ({name(one) for name in names} & {name(other) for name in names} != set()) == (one == other)
    assert len({name(one) for name in names}) == len(names)


def test_a_consumer_is_named_for_its_subject_and_says_it():
    one, other = task_consumer(A, "pay"), task_consumer(A, "ship")
    assert one.name != other.name
    assert one.stream == other.stream == tasks_stream_name(A)
    assert one.name.startswith("c-")
    assert set(one.name) <= set("abcdefghijklmnopqrstuvwxyz234567-")
    assert one.config["filter_subject"] == one.config["metadata"][FILTER_KEY] == task_subject(A, "pay")
    assert one.config["durable_name"] == one.name
    assert one.config["ack_policy"] == "explicit"
    assert one.config["max_deliver"] == -1
    assert "deliver_subject" not in one.config
