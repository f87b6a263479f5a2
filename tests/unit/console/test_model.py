"""The console's fold: whatever comes in whatever order, counts are those of the tasks held, and there is a bound."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.console.flow import SECONDS, Flow
from agentweave_bus.console.model import ConsoleModel, TaskFilter
from agentweave_bus.console.observed import FalseRecord, ObservedRecord, Queues, read_page
from agentweave_bus.types import TaskState

ORDER = "spiffe://shop.test/agent/order"
WEB = "spiffe://shop.test/client/web"
NOW = 1_795_000_000_000


def record(
    key: str = "k", number: int = 0, state: str = "working", at: int = NOW, **more: object
) -> ObservedRecord:
    told = {"agent": ORDER, "sender": WEB, "key": key, "number": number, "epoch": 1, "state": state, "at": at}
    return ObservedRecord.model_validate({**told, "stored_at": at, **more})


def model(most: int = 20_000, now: int = NOW) -> ConsoleModel:
    return ConsoleModel(trust_domain="shop.test", clock_ms=lambda: now, most_tasks=most)


RECORDS = st.builds(
    record,
    key=st.sampled_from([f"k{number}" for number in range(12)]),
    number=st.integers(0, 4),
    state=st.sampled_from([state.value for state in TaskState]),
    at=st.integers(NOW - 5_000, NOW + 5_000),
)


@given(st.lists(RECORDS, max_size=120), st.integers(1, 6))
def test_counts_are_of_the_tasks_held_and_never_too_many(records: list[ObservedRecord], most: int) -> None:
    held = model(most)
    for one in records:
        held.add_records([one])
        rows = held.sections()["tasks"]
        counted = Counter(row["state"] for row in rows)
        assert len(rows) == held.sections()["held"] <= most
        assert {state: number for state, number in held.sections()["counts"].items() if number} == counted
        waiting = {row["key"] for row in rows if row["state"] in {"auth_required", "input_required"}}
        assert {row["key"] for row in held.sections()["approvals"]} == waiting
    assert held.tasks.dropped + len(held.tasks) >= len({one.key for one in records})


@given(
    st.permutations(
        [record(number=number, state=state) for number, state in enumerate(["working", "failed"])]
    )
)
def test_a_record_that_comes_late_or_again_changes_nothing(records: list[ObservedRecord]) -> None:
    held = model()
    held.add_records([*records, *records])
    assert held.sections()["counts"] == {**dict.fromkeys(TaskState, 0), "failed": 1}


def test_the_oldest_that_have_ended_go_first() -> None:
    held = model(3)
    held.add_records(
        [
            record("old", state="working", at=NOW - 9),
            record("ended", state="completed", at=NOW - 5),
            record("later", state="completed", at=NOW - 4),
            record("new", state="working", at=NOW),
        ]
    )
    assert [row["key"] for row in held.sections()["tasks"]] == ["new", "later", "old"]
    assert held.sections()["dropped"] == 1


def test_what_the_first_record_said_is_kept() -> None:
    held = model()
    held.add_records([record(id="i", capability="create", at=NOW - 70), record(number=1, state="completed")])
    (row,) = held.sections()["tasks"]
    assert row["reference"] == f"{ORDER}#create/i@{WEB}"
    assert (row["at_first"], row["took_ms"]) == (NOW - 70, 70)


def test_another_agents_records_under_a_tasks_key_change_nothing_of_it() -> None:
    """Any agent may write, and sign, records of its own under any key; only the first is bound to it."""
    theirs = "spiffe://shop.test/agent/mallory"
    held = model()
    held.add_records([record(number=7, state="completed", agent=theirs)])
    held.add_records([record(id="i", capability="create")])
    held.add_records([record(number=9, state="auth_required", agent=theirs, at=NOW + 1)])
    held.add_records([record(number=1, state="failed", at=NOW + 2)])
    rows = {row["agent"]: row for row in held.sections()["tasks"]}
    assert (rows[ORDER]["state"], rows[ORDER]["reference"]) == ("failed", f"{ORDER}#create/i@{WEB}")
    assert rows[theirs]["reference"] is None
    assert [row["agent"] for row in held.sections()["approvals"]] == [theirs]
    found = held.tasks.get("k")
    assert found is not None
    assert found.agent == ORDER


def test_what_is_not_genuine_counts_nowhere_else() -> None:
    held = model()
    held.add_records([FalseRecord(genuine=False, agent=ORDER, at=NOW, why="another's signature")])
    sections = held.sections()
    assert sections["not_genuine"] == {
        "count": 1,
        "newest": [{"agent": ORDER, "at": NOW, "why": "another's signature"}],
    }
    assert sections["held"] == 0
    assert sum(map(sum, sections["flow"]["series"].values())) == 0


def test_pages_of_both_kinds_are_read() -> None:
    genuine = {**record().model_dump(mode="json"), "genuine": True, "payload": {"card": "4111"}}
    false = {"genuine": False, "agent": ORDER, "at": 1, "why": "no"}
    page = read_page({"records": [genuine, false], "after": {ORDER: 7}, "more": True})
    assert [type(one) for one in page.records] == [ObservedRecord, FalseRecord]
    assert "4111" not in page.model_dump_json()


def test_flow_is_a_ring_of_two_minutes() -> None:
    flow = Flow()
    for back in (0, 1_000, 119_000, 120_000, -5_000):
        flow.count(TaskState.COMPLETED, NOW - back, NOW)
    series = flow.to_json(NOW)["series"]["completed"]
    assert (len(series), series[-1], series[-2], series[0]) == (SECONDS, 2, 1, 1)
    assert flow.to_json(NOW + 1_000)["series"]["completed"][-2] == 2
    assert sum(flow.to_json(NOW + 500_000)["series"]["completed"]) == 0


def test_searching() -> None:
    held = model()
    held.add_records([record("a", id="one", capability="pay"), record("b", id="two", state="failed")])
    assert [row["id"] for row in held.found(TaskFilter(text="ONE"))["tasks"]] == ["one"]
    assert held.found(TaskFilter(state="failed"))["matched"] == 1
    assert held.found(TaskFilter(capability="pay", state="failed"))["matched"] == 0


def test_workers_stand_with_the_queues_of_their_agent() -> None:
    held = model()
    queue = {"agent": "spiffe://shop.test/shops/order", "capability": "create", "pending": 3}
    held.set_queues(
        Queues.model_validate({"queues": [queue], "letters": [{"agent": queue["agent"], "count": 2}]})
    )
    held.set_workers([{"agent": "order", "name": "order-1"}, {"agent": "user", "name": "user"}])
    order, user = held.sections()["agents"]
    assert (order["agent"], order["replicas"], order["letters"]) == (queue["agent"], [{"name": "order-1"}], 2)
    assert (user["agent"], user["queues"]) == ("spiffe://shop.test/agent/user", [])


def test_an_agents_dead_letters_are_those_that_are_listed_where_all_are() -> None:
    held, agent = model(), "spiffe://shop.test/agent/order"
    held.set_queues(Queues.model_validate({"letters": [{"agent": agent, "count": 3}]}))  # two were redriven

    def shown() -> int:
        (row,) = held.sections()["agents"]
        return int(row["letters"])

    assert shown() == 3
    letter = {"letter": f"{agent}#create/{'5e' * 32}.1"}
    held.set_letters([letter], more=False)
    assert shown() == 1
    held.set_letters([letter], more=True)
    assert shown() == 3
    held.set_letters((), more=False, why="not allowed")
    assert shown() == 3


def test_a_source_that_fails_says_since_when() -> None:
    held = model()
    held.source_well("broker")
    held.source_failed("broker", "nobody answers")
    assert held.sections()["sources"]["broker"] == {"ok": False, "why": "nobody answers", "at": NOW}
    assert held.sections()["sources"]["workers"]["ok"] is False
