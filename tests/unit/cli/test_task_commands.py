"""Submitting and following tasks on the command line: what needs no broker."""

from __future__ import annotations

import argparse
import io
import sys
from typing import Any

import pytest

from agentweave_bus.cli import main
from agentweave_bus.cli.audit_records import describe
from agentweave_bus.cli.exit_codes import ExitCode, exit_code_of
from agentweave_bus.cli.task import _code, _due, _print_status
from agentweave_bus.cli.task_drawing import Drawing
from agentweave_bus.exceptions import IdempotencyError, QueueFullError, TaskCanceledError
from agentweave_bus.tasks.events import TaskEvent
from agentweave_bus.tasks.status import Occurrence, TaskStatus
from agentweave_bus.types import TaskResult, TaskState

REFERENCE = "spiffe://shop.test/agent/order#create_order/01890a5d-ac96-774b-bcce-b302099a8057"


def event(kind: Any, **more: Any) -> TaskEvent:
    return TaskEvent(kind=kind, cursor="1.0.0.-", at_ms=1_735_732_800_000, attempt=1, **more)


def drawn(*events: TaskEvent, columns: int = 80) -> str:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        drawing = Drawing(out)
        for one in events:
            drawing.show(one)
        drawing.end()
    return out.getvalue()


def test_states_are_lines_and_progress_is_a_bar_that_is_drawn_over() -> None:
    text = drawn(
        event("state", state=TaskState.WORKING),
        event("progress", fraction=0.25, message="reading"),
        event("progress", fraction=0.5, message="writing"),
        event("state", state=TaskState.FAILED, result=TaskResult("failed", error="no paper")),
    )
    assert text == (
        "12:00:00  working\n"
        "\r\x1b[K[######..................]  25%  reading"
        "\r\x1b[K[############............]  50%  writing"
        "\r\x1b[K12:00:00  failed: no paper\n"
    )


def test_whoever_stops_watching_leaves_the_bar_in_its_line() -> None:
    assert drawn(event("progress", fraction=1.0)).endswith("[########################] 100%\n")


def test_a_bar_fits_the_terminal() -> None:
    (line,) = drawn(event("progress", fraction=0.5, message="x" * 500), columns=40).splitlines()[-1:]
    assert len(line.removeprefix("\x1b[K")) == 39


def test_artifacts_and_gaps() -> None:
    piece = {"type": "page", "data": {"n": 1}, "name": "first"}
    text = drawn(event("artifact", artifact=piece), event("gap", missing=3), event("gap", missing=0))
    assert text.splitlines() == [
        '12:00:00  artifact page first: {"n": 1}',
        "12:00:00  3 messages of progress are missing",
        "12:00:00  progress differs",
    ]


def test_what_an_agent_says_can_not_steer_the_terminal() -> None:
    evil = "\x1b[2Jgone\nforged  completed"
    text = drawn(
        event("state", state=TaskState.WORKING, message=evil),
        event("progress", fraction=0.1, message=evil),
        event("artifact", artifact={"type": evil, "data": evil, "name": evil}),
    )
    assert "\x1b[2J" not in text
    assert "\nforged" not in text


@pytest.mark.parametrize("verb", ["get", "watch", "cancel"])
def test_what_is_no_reference_is_wrong_usage(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task", verb, "o-17"]) == ExitCode.USAGE
    assert "names no task" in capsys.readouterr().err


def test_a_time_to_wait_without_waiting_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", "--target", "spiffe://shop.test/agent/x", "--capability", "y", "--timeout", "3"]
    assert main(words) == ExitCode.USAGE
    assert "--timeout is for --wait" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "code"),
    [
        (TaskState.COMPLETED, ExitCode.DONE),
        (TaskState.FAILED, ExitCode.FAILED),
        (TaskState.CANCELED, ExitCode.FAILED),
        (TaskState.REJECTED, ExitCode.DENIED),
    ],
)
def test_a_watched_tasks_end_is_the_exit_code(state: TaskState, code: ExitCode) -> None:
    assert _code(state) == code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TaskCanceledError("x"), ExitCode.FAILED),
        (IdempotencyError("x"), ExitCode.USAGE),
        (QueueFullError("x"), ExitCode.UNREACHABLE),
    ],
)
def test_exit_codes_of_what_a_submitter_may_meet(error: Any, code: ExitCode) -> None:
    assert exit_code_of(error) == code


def test_audit_records_about_tasks_are_told_in_words() -> None:
    who = {"iss": "spiffe://a.test/client/cli", "aud": "spiffe://a.test/agent/x", "log": "cli", "ts": 0}
    submitted = describe({**who, "event": "submit", "cap": "work", "reason": "grant 1"})
    assert "submitted spiffe://a.test/client/cli -> spiffe://a.test/agent/x work: grant 1" in submitted
    told = describe({**who, "event": "control", "cap": "cancel", "reason": "twice"})
    assert "told      spiffe://a.test/client/cli -> spiffe://a.test/agent/x cancel: twice" in told
    redriven = describe(
        {**who, "event": "reissue", "cap": "work", "attempt": 2, "operator": "spiffe://a.test/o"}
    )
    assert "agent/x work: attempt 2, for spiffe://a.test/o" in redriven
    started = describe({"event": "start", "instance": "x pid 1", "log": "cli", "ts": 0})
    assert started.endswith("start     x pid 1")


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"due_at": 1_735_732_800_000}, "due at 2025-01-01 12:00:00Z"),
        ({"due_at": 1_735_732_800_000, "every": "1h"}, "every 1h, next at 2025-01-01 12:00:00Z"),
        ({"every": "1h"}, "every 1h, comes no more"),
        ({"every": "1h", "state": TaskState.CANCELED}, "every 1h"),
    ],
)
def test_when_a_task_is_due_is_said_in_words(
    told: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    last = Occurrence(id="x", reference=REFERENCE, at_ms=1_735_729_200_000, state=TaskState.COMPLETED)
    status = TaskStatus(**{"state": TaskState.SUBMITTED, "last_occurrence": last} | told)
    _print_status(argparse.Namespace(reference=REFERENCE, json=False), status)
    assert capsys.readouterr().out.splitlines()[1:] == [
        said,
        f"last: completed, that of 2025-01-01 11:00:00Z: {REFERENCE}",
    ]


def test_a_table_says_when_tasks_are_due() -> None:
    due = 1_735_732_800_000
    assert _due({"state": "submitted"}) == ""
    assert _due({"due_at": due}) == "2025-01-01 12:00:00Z"
    assert _due({"due_at": due, "every": "1h"}) == "2025-01-01 12:00:00Z, every 1h"
