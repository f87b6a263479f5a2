"""What may follow what in the life of a task."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.tasks.state import FOLLOWS, REDRIVEN, may_follow, next_epoch
from agentweave_bus.types import TaskState

STATES = st.sampled_from(TaskState)


def walk(wanted: list[TaskState]) -> list[tuple[TaskState, int]]:
    """Take each of the states wanted that may come next; what may not is left out."""
    lived: list[tuple[TaskState, int]] = []
    for state in wanted:
        before, epoch = lived[-1] if lived else (None, 0)
        after = next_epoch(epoch, state)
        if may_follow(before, epoch, state, after):
            lived.append((state, after))
    return lived


@given(st.lists(STATES, max_size=40))
def test_a_task_ends_at_most_once_and_nothing_follows(wanted):
    lived = walk(wanted)
    assert sum(state.terminal for state, _ in lived) <= 1
    assert not any(state.terminal for state, _ in lived[:-1])


@given(st.lists(STATES, max_size=40))
def test_the_epoch_is_the_number_of_attempts_that_began(wanted):
    lived = walk(wanted)
    for number, (_, epoch) in enumerate(lived):
        assert epoch == sum(state is TaskState.WORKING for state, _ in lived[: number + 1])


@given(before=STATES, after=STATES, epoch=st.integers(0, 5), jump=st.integers(-2, 3))
def test_no_record_may_skip_or_repeat_an_epoch(before, after, epoch, jump):
    lawful = after in FOLLOWS[before] and jump == (1 if after is TaskState.WORKING else 0)
    assert may_follow(before, epoch, after, epoch + jump) is lawful


def test_a_task_completes_only_out_of_an_attempt():
    for before in (None, *TaskState):
        assert (TaskState.COMPLETED in FOLLOWS[before]) is (before is TaskState.WORKING)


@pytest.mark.parametrize("before", [state for state in TaskState if not state.terminal])
def test_whatever_has_not_ended_can_be_canceled(before):
    assert TaskState.CANCELED in FOLLOWS[before]


def test_every_state_has_its_row():
    assert set(FOLLOWS) == {None, *TaskState}


def test_a_redrive_takes_back_a_failure_and_nothing_else():
    for before in (None, *TaskState):
        for after in TaskState:
            lawful = (before, after) == (TaskState.FAILED, TaskState.WORKING)
            assert may_follow(before, 3, after, next_epoch(3, after), redriven=True) is lawful
    assert not may_follow(TaskState.FAILED, 3, TaskState.WORKING, 3, redriven=True)
    assert not may_follow(TaskState.FAILED, 3, TaskState.WORKING, 4)
    assert set(REDRIVEN) == {TaskState.FAILED}
