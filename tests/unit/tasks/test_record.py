"""What a record says: the bytes that are written, and that no one is written which nobody could read."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from agentweave_bus.envelope import decode_payload, encode_payload
from agentweave_bus.exceptions import PayloadError
from agentweave_bus.tasks.approval import Asked, Decided
from agentweave_bus.tasks.record import ProgressMark, RecordBody, RecordPayload, TaskNamed
from agentweave_bus.types import TaskState
from tests.unit.tasks.conftest import PD, body

NAMED = TaskNamed(capability="work", id="1")
EVERYTHING = RecordBody(
    state=TaskState.FAILED,
    pd=PD,
    message="no",
    result={"status": "failed", "error": "no"},
    retry_at=5,
    step="park",
    redrive="AA==",
    given_back=True,
    undoes=True,
    blob={"key": "k"},
    progress=ProgressMark(count=2, digest=PD),
    task=NAMED,
    asked=Asked(approvers=("spiffe://a.io/boss",), until=7, involved=()),
    decided=Decided(by="spiffe://a.io/boss", at=6, control=PD, reason="why not"),
)


def test_what_is_written_has_the_fields_of_what_is_read() -> None:
    assert {"v", *RecordBody._fields} == set(RecordPayload.model_fields)


def test_it_says_what_it_has_in_one_order() -> None:
    assert EVERYTHING.encoded() == encode_payload(
        {
            "v": 1,
            "state": "failed",
            "pd": PD,
            "message": "no",
            "result": {"status": "failed", "error": "no"},
            "retry_at": 5,
            "step": "park",
            "redrive": "AA==",
            "given_back": True,
            "undoes": True,
            "blob": {"key": "k"},
            "progress": {"count": 2, "digest": PD},
            "task": {"capability": "work", "id": "1"},
            "asked": {"approvers": ["spiffe://a.io/boss"], "until": 7, "involved": []},
            "decided": {"by": "spiffe://a.io/boss", "at": 6, "control": PD, "reason": "why not"},
        }
    )


@pytest.mark.parametrize(
    ("said", "written"),
    [
        (body(TaskState.WORKING), {}),
        (body(TaskState.WORKING, task=NAMED), {"task": {"capability": "work", "id": "1"}}),
        (body(TaskState.WORKING, undoes=True), {"undoes": True}),
        (body(TaskState.WORKING, result={}), {"result": {}}),
    ],
)
def test_what_there_is_nothing_of_is_left_out(said: RecordBody, written: dict[str, object]) -> None:
    assert said.encoded() == encode_payload({"v": 1, "state": "working", "pd": PD} | written)


@pytest.mark.parametrize("said", [EVERYTHING, body(TaskState.WORKING), body(TaskState.WORKING, task=NAMED)])
def test_it_is_read_as_it_was_written(said: RecordBody) -> None:
    assert RecordBody.read(decode_payload(said.encoded())) == said


def test_it_has_the_fields_of_what_is_read() -> None:
    assert {"v", *RecordBody._fields} == set(RecordPayload.model_fields)


@pytest.mark.parametrize(
    "changed",
    [
        {"v": 2},
        {"more": 1},
        {"state": "done"},
        {"pd": PD[1:]},
        {"message": 1},
        {"retry_at": True},
        {"undoes": False},
        {"progress": {"count": -1, "digest": PD}},
        {"task": {"capability": "work"}},
        {"task": {"capability": "work", "id": "1", "more": 1}},
        {"task": {"capability": "work", "id": 1}},
        {"task": {"capability": "work", "id": "1" * 65}},
        {"task": ["work", "1"]},
    ],
)
def test_what_is_no_record_is_not_read(changed: dict[str, object]) -> None:
    said = {"v": 1, "state": "working", "pd": PD}
    assert RecordBody.read(said) == body(TaskState.WORKING)
    with pytest.raises(ValidationError):
        RecordBody.read(said | changed)


def test_a_record_is_no_list() -> None:
    with pytest.raises(ValidationError):
        RecordBody.read(["working", PD])


@pytest.mark.parametrize(
    "more",
    [
        {"message": "x" * 4_001},
        {"message": "\ud800"},
        {"step": "x" * 33},
        {"redrive": "x" * 131_073},
        {"retry_at": -1},
        {"retry_at": 2**53},
        {"result": {"x": "\ud800"}},
        {"result": {"x": {1}, 1: 2}},
        {"result": {"x": "x" * 800_000}},
    ],
)
def test_what_nobody_could_read_is_not_written(more: dict[str, object]) -> None:
    with pytest.raises(PayloadError):
        body(TaskState.SUBMITTED, **more).encoded()
