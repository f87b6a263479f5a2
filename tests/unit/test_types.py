"""The plain values: their JSON form, both ways, and what they refuse."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.exceptions import PayloadError
from agentweave_bus.types import (
    AgentCard,
    Artifact,
    Capability,
    DataPart,
    Message,
    Task,
    TaskResult,
    TaskState,
    TextPart,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
parts = st.one_of(st.builds(DataPart, json_values), st.builds(TextPart, st.text()))
messages = st.builds(Message, st.sampled_from(["assistant", "user"]), st.lists(parts, max_size=3))
artifacts = st.fixed_dictionaries({"type": st.text(), "data": json_values}, optional={"name": st.text()})
results = st.builds(
    TaskResult,
    status=st.sampled_from(["completed", "failed"]),
    messages=st.lists(messages, max_size=3),
    artifacts=st.lists(artifacts, max_size=2),
    error=st.none() | st.text(),
)


def answer(data: object, **more: object) -> TaskResult:
    return TaskResult(status="completed", messages=[Message("assistant", [DataPart(data)])], **more)


@given(results)
def test_a_result_survives_its_json_form(result: TaskResult) -> None:
    assert TaskResult.from_json(json.loads(json.dumps(result.to_json()))) == result


@given(results)
def test_the_full_form_reads_back_to_the_same_result(result: TaskResult) -> None:
    wire = result.to_json(full=True)
    assert [dict(a) for a in result.artifacts] == wire.get("artifacts", [])
    assert TaskResult.from_json(wire) == result


def test_the_json_form_is_as_documented() -> None:
    result = TaskResult(
        status="failed",
        messages=[Message(role="assistant", parts=[DataPart(data={"a": 1}), TextPart(text="so")])],
        artifacts=[{"type": "receipt", "data": [1]}],
        error="no",
    )
    assert result.to_json() == {
        "status": "failed",
        "messages": [
            {
                "role": "assistant",
                "parts": [{"type": "data", "data": {"a": 1}}, {"type": "text", "text": "so"}],
            }
        ],
        "artifacts": [{"type": "receipt", "data": [1]}],
        "error": "no",
    }


def test_artifacts_follow_from_data_parts_and_are_not_sent_twice() -> None:
    result = answer({"order_id": "o-1"})
    assert result.artifacts[0]["data"] == {"order_id": "o-1"}
    assert result.artifacts == [{"type": "data", "data": {"order_id": "o-1"}}]
    assert "artifacts" not in result.to_json()
    assert TaskResult.from_json(result.to_json()).artifacts[0]["data"]["order_id"] == "o-1"


def test_given_artifacts_stand_as_they_are() -> None:
    result = answer({"a": 1}, artifacts=[Artifact(type="billing_result", data={"b": 2})])
    assert result.artifacts == [{"type": "billing_result", "data": {"b": 2}}]
    assert result.data == {"b": 2}


def test_a_result_without_data_has_none() -> None:
    assert TaskResult(status="completed").data is None
    assert TaskResult(status="completed").artifacts == []


@pytest.mark.parametrize("status", ["completed", "failed", "degraded"])
def test_a_status_compares_equal_to_its_text(status: str) -> None:
    assert TaskResult(status=status).status == status
    assert f"{TaskResult(status=status).status}" == status


def test_degraded_is_completed_on_the_wire() -> None:
    result = TaskResult(status="degraded")
    assert result.to_json()["status"] == "completed"
    with pytest.raises(PayloadError, match="degraded"):
        TaskResult.from_json({"status": "degraded"})


@pytest.mark.parametrize("bad", ["complete", "COMPLETED", "", None, 1])
def test_another_status_is_refused(bad: object) -> None:
    with pytest.raises(PayloadError, match="completed, failed, degraded"):
        TaskResult(status=bad)  # type: ignore[arg-type]


def test_a_misspelt_status_names_the_nearest() -> None:
    with pytest.raises(PayloadError, match="did you mean 'completed'"):
        TaskResult(status="complete")


def test_states_know_which_are_final() -> None:
    assert TaskState.WORKING == "working"
    assert {state.value for state in TaskState if state.terminal} == {
        "completed",
        "failed",
        "canceled",
        "rejected",
    }


@pytest.mark.parametrize(
    ("wire", "place"),
    [
        ([], "result must be a dict"),
        ({}, "'status' is missing"),
        ({"status": "completed", "extra": 1}, "'extra' is no known key"),
        ({"status": "completed", "messages": {}}, "result.messages must be a list"),
        ({"status": "completed", "messages": [1]}, r"messages\[0\] must be a dict"),
        ({"status": "completed", "messages": [{"role": "system", "parts": []}]}, r"messages\[0\].role"),
        ({"status": "completed", "messages": [{"role": "user"}]}, "'parts' is missing"),
        (
            {"status": "completed", "messages": [{"role": "user", "parts": [{"type": "blob"}]}]},
            r"messages\[0\].parts\[0\].type",
        ),
        (
            {"status": "completed", "messages": [{"role": "user", "parts": [{"type": "text", "text": 1}]}]},
            r"messages\[0\].parts\[0\].text",
        ),
        (
            {"status": "completed", "messages": [{"role": "user", "parts": [{"type": "data"}]}]},
            "'data' is missing",
        ),
        ({"status": "completed", "artifacts": [{"type": "x"}]}, r"artifacts\[0\]: 'data' is missing"),
        ({"status": "completed", "artifacts": [{"type": "x", "data": 1, "k": 1}]}, "'k' is no known key"),
        ({"status": "failed", "error": 5}, "error must be a str"),
    ],
)
def test_reading_refuses_and_names_the_place(wire: object, place: str) -> None:
    with pytest.raises(PayloadError, match=place):
        TaskResult.from_json(wire)


@pytest.mark.parametrize("bad", [Decimal(1), datetime.now(UTC), float("nan"), {1: 2}, b"x", {"a": {1, 2}}])
def test_writing_refuses_what_is_no_json_value_and_names_the_place(bad: object) -> None:
    with pytest.raises(PayloadError, match=r"messages\[0\]\.parts\[0\]\.(data|each key of data)"):
        answer(bad).to_json()


def test_writing_ends_on_a_value_that_holds_itself() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(PayloadError, match="nested deeper"):
        answer(loop).to_json()


def test_converting_reaches_parts_and_artifacts() -> None:
    result = answer(Decimal(1), artifacts=[{"type": "t", "data": Decimal(2)}]).converted(str)
    assert result.messages[0].parts[0] == DataPart("1")
    assert result.artifacts == [{"type": "t", "data": "2"}]


def test_converting_keeps_derived_artifacts_derived() -> None:
    assert answer(Decimal(1)).converted(str).artifacts == [{"type": "data", "data": "1"}]


def test_a_message_takes_parts_only() -> None:
    with pytest.raises(PayloadError, match=r"parts\[0\] must be a DataPart or TextPart, not dict"):
        Message("assistant", [{"type": "data", "data": 1}])  # type: ignore[list-item]
    with pytest.raises(PayloadError, match="role must be one of assistant, user"):
        Message("agent", [])


def test_a_part_knows_its_type() -> None:
    assert (DataPart(1).type, TextPart("x").type) == ("data", "text")


def test_a_task_has_an_id_of_its_own() -> None:
    first, second = Task("quote", {"item": "x"}), Task("quote")
    assert first.id != second.id
    assert Task.from_json(first.to_json()) == first
    with pytest.raises(PayloadError, match="payload must be a dict"):
        Task.from_json({"id": "1", "type": "quote", "payload": []})


def test_a_card_survives_its_json_form() -> None:
    quote = Capability("quote", "A price", schema={"type": "object"})
    card = AgentCard("pricing", "Prices", "spiffe://a.io/agent/pricing", [quote])
    assert AgentCard.from_json(json.loads(json.dumps(card.to_json()))) == card
    assert card.to_json()["capabilities"][0]["input_modes"] == ["application/json"]
    with pytest.raises(PayloadError, match=r"capabilities\[0\]: 'name' is missing"):
        AgentCard.from_json({**card.to_json(), "capabilities": [{}]})
    with pytest.raises(PayloadError, match=r"capabilities\[0\].input_modes\[0\]"):
        AgentCard.from_json({**card.to_json(), "capabilities": [{"name": "x", "input_modes": [1]}]})
