"""Reconciling finds each thing that may not be, in histories that are written by hand."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.subjects import step_subject
from tests.chaos.effects import Effect
from tests.chaos.history import History, Record, StepDone
from tests.chaos.plan import AGENT, ATTEMPTS
from tests.chaos.reconcile import Accepted, Event, Reconciled, reconcile

TASK = Accepted(0, "steps", "id-0", "reference")
KEY = TASK.key
STEP = step_subject(AGENT, KEY, "charge 0").rpartition(".")[2]


def record(sequence, slot, state, epoch, **more):
    """A record that follows on the one in the slot before."""
    body = more.pop("body", {})
    values = {
        "sequence": sequence,
        "slot": slot,
        "number": slot,
        "state": state,
        "epoch": epoch,
        "task": "t",
        "digest": f"d{slot}",
        "before": f"d{slot - 1}" if slot else None,
        "body": body,
    }
    return Record(**{**values, **more})


def result(number=0, token="x"):
    data = {"number": number, "tokens": {"charge": token}}
    return {"result": {"messages": [{"parts": [{"type": "data", "data": data}]}]}}


def effects(*whats):
    """Effects in this order: (attempt, what, token)."""
    return [
        Effect(line, line, 1, TASK.id, attempt, what, "charge" if token else "steps", token)
        for line, (attempt, what, token) in enumerate(whats, 1)
    ]


class Case:
    """A task that ran twice, its step once, and everything right about it."""

    def __init__(self) -> None:
        self.records = [
            record(1, 0, "working", 1),
            record(3, 1, "working", 2),
            record(4, 2, "completed", 2, body=result()),
        ]
        self.effects = effects(
            (1, "begin", ""),
            (1, "ran", "x"),
            (1, "got", "x"),
            (2, "begin", ""),
            (2, "got", "x"),
            (2, "end", ""),
        )
        self.steps = [StepDone(2, STEP, {"value": "x"})]
        self.events: list[Event] | None = None
        self.accepted = [TASK]
        self.history = History()

    def reconciled(self) -> Reconciled:
        self.history.records[KEY] = self.records
        self.history.steps[KEY] = self.steps
        seen = self.events
        if seen is None:
            seen = [Event(0, one.state, f"s{one.slot}", one.epoch) for one in self.records]
        return reconcile(1, self.accepted, seen, self.effects, self.history)

    def told(self) -> list[str]:
        return [finding.what for finding in self.reconciled().findings]


@pytest.fixture
def case() -> Case:
    return Case()


def test_what_is_right_is_counted_and_nothing_else_said(case):
    made = case.reconciled()
    assert made.findings == []
    assert made.counts["tasks run more than once"] == 1
    assert made.counts["steps run"] == made.counts["completed"] == made.counts["accepted"] == 1
    assert made.counts["steps run more than once, not recorded before"] == 0


def test_a_task_without_records(case):
    case.records = []
    assert "was accepted and has no record at all" in case.told()


def test_a_task_that_never_ended(case):
    case.records.pop()
    assert "has no terminal record; its last is working of attempt 2" in case.told()


def test_a_task_nobody_accepted(case):
    case.accepted = []
    assert "was never accepted" in case.told()
    assert "is recorded, and nobody had it accepted" in case.told()
    assert "has effects, and nobody had it accepted" in case.told()


def test_one_idempotency_key_that_made_two_tasks(case):
    case.accepted.append(TASK._replace(id="id-1"))
    assert "was accepted twice under one idempotency key" in case.told()


def test_two_records_in_one_slot(case):
    case.records.insert(2, record(3, 1, "completed", 1, digest="late", body=result()))
    assert "has more than one record in slot 1" in case.told()
    assert "has 2 terminal records" in case.told()


def test_something_after_the_end(case):
    case.records.append(record(9, 3, "working", 3))
    assert "has 1 records after its terminal one" in case.told()
    assert "goes from completed to working" in case.told()


def test_a_slot_left_out(case):
    case.records[2] = case.records[2]._replace(slot=3)
    assert "has records in slots [0, 1, 3]" in case.told()


def test_a_record_that_names_another_before_it(case):
    case.records[2] = case.records[2]._replace(before="else")
    assert "record 2 does not name the one before it" in case.told()


def test_a_record_of_another_head(case):
    case.records[2] = case.records[2]._replace(task="u")
    assert "record 2 is of another head" in case.told()


def test_an_attempt_counted_wrongly(case):
    case.records[1] = case.records[1]._replace(epoch=3)
    assert "goes from attempt 1 to 3 with working" in case.told()


def test_a_failure_that_nothing_excuses(case):
    case.records[2] = record(4, 2, "failed", 2, body={"result": {"status": "failed"}})
    assert any("should be completed, is failed in attempt 2" in what for what in case.told())


def test_what_was_given_up_has_a_dead_letter(case):
    case.records = [record(number, number, "working", number + 1) for number in range(ATTEMPTS)]
    case.records.append(record(ATTEMPTS, ATTEMPTS, "failed", ATTEMPTS))
    assert case.told() == ["was given up, and its dead letter has nothing"]
    case.history.dead[KEY] = {"frame", "record"}
    assert case.told() == []


def test_the_result_of_another_task(case):
    case.records[2] = record(4, 2, "completed", 2, body=result(number=7))
    assert any(what.startswith("has a result of something else") for what in case.told())


def test_what_a_watcher_must_see(case):
    right = [Event(0, "working", "a", 1), Event(0, "working", "b", 2), Event(0, "completed", "d", 2)]
    case.events = [*right[:2], Event(0, "progress", "c", 2), right[2]]
    assert case.told() == []
    case.events = right[:2]
    assert [what[:11] for what in case.told()] == ["was seen as"]
    case.events = [right[1], right[0], right[2]]
    assert [what[:11] for what in case.told()] == ["was seen as"]
    case.events = [*right[:2], Event(0, "progress", "b", 2), right[2]]
    assert case.told() == ["was seen twice at b"]
    case.events = [*right[:2], Event(0, "gap", "c", 2), right[2]]
    assert case.told() == ["was seen with a gap in its progress"]


def test_an_attempt_that_ran_twice_or_without_record(case):
    case.effects += effects((2, "begin", ""), (5, "begin", ""))
    assert "attempt 2 was run 2 times" in case.told()
    assert "attempt 5 was run and nobody recorded that it began" in case.told()


def test_a_completion_whose_handler_did_not_end(case):
    case.effects.pop()
    assert "attempt 2 is recorded as completed, and its handler did not end" in case.told()


def test_a_step_that_is_not_recorded(case):
    case.steps = []
    assert "step charge returned and is not recorded" in case.told()


def test_a_step_that_ran_again_after_it_was_recorded(case):
    case.effects = effects(
        (1, "begin", ""),
        (1, "ran", "x"),
        (1, "got", "x"),
        (2, "begin", ""),
        (2, "ran", "y"),
        (2, "got", "y"),
        (2, "end", ""),
    )
    told = case.told()
    assert "step charge had returned before attempt 2 began, and ran again in it" in told
    assert "step charge was recorded before attempt 2 began, and ran again in it" in told
    assert "step charge returned different things to different attempts" in told


def test_a_step_that_ran_again_before_it_was_recorded_is_lawful(case):
    """A crash between doing and writing down: the one case in which a step runs again."""
    case.steps = [StepDone(4, STEP, {"value": "y"})]
    case.records[2] = record(5, 2, "completed", 2, body=result(token="y"))
    case.effects = effects(
        (1, "begin", ""),
        (1, "ran", "x"),
        (2, "begin", ""),
        (2, "ran", "y"),
        (2, "got", "y"),
        (2, "end", ""),
    )
    made = case.reconciled()
    assert made.findings == []
    assert made.counts["steps run more than once, not recorded before"] == 1


def test_a_step_that_ran_twice_in_one_attempt(case):
    case.effects.insert(2, case.effects[1])
    assert "step charge ran more than once in attempt 1" in case.told()


def test_a_step_that_returned_what_it_never_did_or_is_not_recorded(case):
    case.steps = [StepDone(2, STEP, {"value": "z"})]
    assert "step charge returned something else than what is recorded" in case.told()
    case.effects[1] = case.effects[1]._replace(token="z")
    assert "step charge returned what it never did" in case.told()


def test_a_result_that_tells_other_steps(case):
    case.records[2] = record(4, 2, "completed", 2, body=result(token="y"))
    assert "its result says other things of its steps than they returned" in case.told()


def test_what_is_foreign_and_what_is_left_in_the_queue(case):
    case.history.foreign.append("somewhere: nonsense")
    case.history.queued = 2
    assert case.told() == ["no genuine record: somewhere: nonsense", "2 messages are left in the queue"]
