"""Reading along in audit logs: nothing is missed, nothing twice, and a step reads so much and no more."""

from __future__ import annotations

import json
from pathlib import Path

from agentweave_bus.console.decisions import Decisions
from agentweave_bus.console.decisions_feed import LogTail
from agentweave_bus.tasks.operator_acts import OBSERVE_ACT

CHAIN = "order.20261121T085402Z.60b1838c018229ed2b16366216ea1580"


def line(number: int, **more: object) -> str:
    told = {"audit_id": f"c-{number}", "ts": 1_000 + number, "seq": number, "event": "admission"}
    decision = {"allowed": True, "caller": "spiffe://a.test/b", "callee": "spiffe://a.test/c", "action": "x"}
    return json.dumps({**told, **decision, **more}) + "\n"


def read(tail: LogTail) -> list[int]:
    return [record["seq"] for record in tail.step()]


def test_what_is_added_is_read_once_also_in_further_files(tmp_path: Path) -> None:
    first, second = tmp_path / f"{CHAIN}.0001.jsonl", tmp_path / f"{CHAIN}.0002.jsonl"
    first.write_text(line(1))
    tail = LogTail([tmp_path])
    assert read(tail) == [1]
    with first.open("a") as file:
        file.write(line(2) + line(3)[:20])
    assert read(tail) == [2]
    with first.open("a") as file:
        file.write(line(3)[20:])
    second.write_text(line(4))
    assert read(tail) == [3, 4]
    assert read(tail) == []


def test_of_what_was_there_before_it_reads_the_end(tmp_path: Path) -> None:
    (tmp_path / f"{CHAIN}.0001.jsonl").write_text("".join(map(line, range(5_000))))
    found = read(LogTail([tmp_path]))
    assert found[-1] == 4_999
    assert 0 < len(found) < 1_000


def test_a_step_reads_so_much_and_no_more(tmp_path: Path) -> None:
    file = tmp_path / f"{CHAIN}.0001.jsonl"
    file.write_text(line(0))
    tail = LogTail([tmp_path])
    tail.step()
    file.write_text("".join(map(line, range(5_000))))
    first = read(tail)
    assert 0 < len(first) < 4_000
    found = [0, *first]
    while more := read(tail):
        found += more
    assert found == list(range(5_000))


def test_a_line_without_end_stops_nobody(tmp_path: Path) -> None:
    file = tmp_path / f"{CHAIN}.0001.jsonl"
    file.write_text("")
    tail = LogTail([tmp_path])
    tail.step()
    file.write_text("x" * 600_000 + "\n" + line(1))
    assert [one for _ in range(4) for one in read(tail)] == [1]


def test_decisions_are_told_apart_and_show_no_payload() -> None:
    decisions = Decisions()
    secret = {"context": {"payload": {"card": "4111"}, "principal": {"iss": "https://i.test", "sub": "ada"}}}
    for number, more in enumerate(
        (
            {"input": secret},
            {"event": "refusal", "allowed": False, "reason": "no grant"},
            {"event": "refusal", "allowed": None, "step": 4, "step_name": "proof"},
            {"event": "outcome"},
            {"action": OBSERVE_ACT},
            {"event": "refusal", "allowed": False, "action": OBSERVE_ACT},
        )
    ):
        record = json.loads(line(number, **more))
        decisions.add({name: value for name, value in record.items() if value is not None} | {"log": "order"})
    assert decisions.counts == {"allowed": 1, "denied": 2, "refused": 1}
    newest = decisions.newest()
    assert [row["at"] for row in newest] == [1_005, 1_002, 1_001, 1_000]
    assert newest[-1]["principal"] == {"iss": "https://i.test", "sub": "ada"}
    assert "4111" not in json.dumps(newest)


def test_only_the_newest_decisions_are_kept() -> None:
    decisions = Decisions(3)
    for number in range(9):
        decisions.add(json.loads(line(number)))
    assert [row["at"] for row in decisions.newest()] == [1_008, 1_007, 1_006]
    assert decisions.counts["allowed"] == 9
