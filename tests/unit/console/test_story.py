"""A task's story: the logs' records and the broker's laid beside each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus.console.story import task_story
from agentweave_bus.console.story_logs import TaskLogs, logs_of_task
from agentweave_bus.console.task_book import TaskRow
from agentweave_bus.types import TaskState

WEB, GATEWAY = "spiffe://shop.test/client/web", "spiffe://shop.test/agent/gateway"
ORDER, PAYMENT = "spiffe://shop.test/agent/order", "spiffe://shop.test/agent/payment"
ROW = TaskRow("k", ORDER, GATEWAY, 1, TaskState.COMPLETED, 1, 9_000, "create_order", "task-1", 1_000)
LINK = {"iss": WEB, "aud": GATEWAY, "cap": "route", "id": "call-0"}


def record(ts: int, event: str, log: str = "order", *, via: Any = (LINK,), **more: Any) -> dict[str, Any]:
    told = {"audit_id": f"c-{ts}", "ts": ts, "seq": ts, "event": event, "id": "task-1", "digest": "d1"}
    asked = {
        "caller": GATEWAY,
        "callee": ORDER,
        "action": "create_order",
        "cap": "create_order",
        "aud": ORDER,
        "allowed": True,
    }
    context = {
        "payload": {"card": "4111"},
        "via": list(via),
        "principal": {"iss": "https://i.test", "sub": "ada"},
    }
    return {
        **told,
        **asked,
        "reason": "grant 1 allows it",
        "revision": "r7",
        "input": {"context": context},
        **more,
    }


NESTED = {
    "id": "call-2",
    "digest": "d2",
    "caller": ORDER,
    "callee": PAYMENT,
    "aud": PAYMENT,
    "action": "pay",
    "cap": "pay",
}
TASK_LINK = {"iss": GATEWAY, "aud": ORDER, "cap": "create_order", "id": "task-1"}


def written(folder: Path) -> Path:
    """The logs of everybody, with what has nothing to do with it, and nonsense."""
    logs = {
        "order": [
            record(2_000, "admission"),
            record(3_000, "call", via=(LINK, TASK_LINK), **NESTED),
            {
                "audit_id": "c-8",
                "ts": 8_000,
                "seq": 8,
                "event": "outcome",
                "digest": "d1",
                "status": "completed",
                "ms": 6.5,
            },
            record(2_500, "admission", id="task-9", digest="d9"),
        ],
        "payment": [
            record(
                3_500,
                "refusal",
                via=(LINK, TASK_LINK),
                **NESTED | {"allowed": False, "step_name": "authorization"},
            ),
            {
                "audit_id": "c-4",
                "ts": 4_000,
                "seq": 4,
                "event": "outcome",
                "digest": "d2",
                "status": "failed",
                "ms": 1,
            },
        ],
    }
    for log, records in logs.items():
        lines = [json.dumps(one) for one in records]
        (folder / f"{log}.x.jsonl").write_text("\n".join(["{task-1", *lines, '["task-1"]']) + "\n")
    return folder


def test_what_was_asked_on_its_behalf_stands_in_it(tmp_path: Path) -> None:
    logs = logs_of_task([written(tmp_path)], "task-1", "d1")
    assert logs.whole
    state = {"at": 2_100, "writer": ORDER, "state": "working", "epoch": 1, "digest": "aa", "genuine": True}
    false = {"genuine": False, "agent": ORDER, "at": 2_200, "why": "by another"}
    story = task_story(ROW, {"records": [state, false], "steps": [], "progress": []}, logs)
    assert [(one["kind"], one["who"].rpartition("/")[2], one["title"]) for one in story["timeline"]] == [
        ("admitted", "order", "let in"),
        ("state", "order", "working"),
        ("state", "order", "what stands in its log here is not genuine"),
        ("nested", "order", "asked payment: pay"),
        ("denied", "payment", "denied by policy (authorization)"),
        ("nested", "payment", "payment: pay failed"),
        ("outcome", "order", "outcome: completed"),
    ]
    assert [one.get("depth") for one in story["timeline"]] == [None, None, None, 1, 1, 1, None]
    assert story["timeline"][0]["audit"] == {"log": "order", "audit_id": "c-2000", "chain": "c", "seq": 2_000}
    assert [(one["who"], one["asked"]) for one in story["chain"]] == [
        (WEB, "route"),
        (GATEWAY, "create_order"),
    ]
    assert story["principal"] == {"iss": "https://i.test", "sub": "ada"}
    assert "4111" not in json.dumps(story)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("task", ("waits", "to be approved of first")),
        ("call", ("denied", "denied by policy (authorization)")),
    ],
)
def test_what_waits_for_an_approval_is_not_denied(tmp_path: Path, kind: str, told: tuple[str, str]) -> None:
    asked = record(
        2_000,
        "refusal",
        allowed=False,
        step_name="authorization",
        approvers=["spiffe://shop.test/person/anna"],
    )
    asked["input"]["context"]["kind"] = kind
    (tmp_path / "order.x.jsonl").write_text(json.dumps(asked) + "\n")
    story = task_story(
        ROW, {"records": [], "steps": [], "progress": []}, logs_of_task([tmp_path], "task-1", "d1")
    )
    assert [(one["kind"], one["title"]) for one in story["timeline"]] == [told]


def test_without_logs_there_is_what_the_broker_has() -> None:
    told = {
        "records": [],
        "steps": [{"at": 5, "epoch": 1, "digest": "ff"}],
        "progress": [{"at": 6, "fraction": 0.5}],
    }
    story = task_story(ROW, told, TaskLogs([], [], whole=False))
    assert [(one["kind"], one["title"]) for one in story["timeline"]] == [
        ("step", "a step is on record"),
        ("progress", "50%"),
    ]
    assert (story["logs_whole"], story["principal"], len(story["chain"])) == (False, None, 1)


def test_a_story_is_bounded() -> None:
    told = {"steps": [{"at": number, "epoch": 1, "digest": "ff"} for number in range(2_500)]}
    story = task_story(ROW, told, TaskLogs([], [], whole=True))
    assert (len(story["timeline"]), story["left_out"]) == (2_000, 500)
