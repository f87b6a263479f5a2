"""What strangers wrote can't steer the terminal that it is shown in."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agentweave_bus.cli.output import as_json, counted, message, print_result, show_line, table
from agentweave_bus.envelope import convert_payload
from agentweave_bus.exceptions import PayloadError

HOSTILE = "\x1b]52;c;cm0=\x07\x1b[2K\r\x7f\x9b31m\u2028\u202e\u2066\u200f\ud800\tend \u00fc\u4e2d"
STEERING = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def test_json_says_the_same_in_plain_text() -> None:
    text = as_json({HOSTILE: [HOSTILE]})
    assert not STEERING.search(text)
    assert "\\u001b]52" in text
    assert "\\u009b31m" in text
    assert "\\u202e" in text
    assert "\u00fc\u4e2d" in text, "people's own letters stay"
    assert json.loads(text) == {HOSTILE: [HOSTILE]}


@pytest.mark.usefixtures("terminal")
def test_text_for_people_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    message(f"first\n{HOSTILE}")
    print_result({}, f"second\n{HOSTILE}", json_wanted=False)
    shown = "".join(capsys.readouterr())
    assert not STEERING.search(shown)
    assert "first\n\\x1b]52" in shown


def test_a_workers_line_stays_behind_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    show_line("a", 3, f"x\rpayment | paid\t{HOSTILE}")
    shown = capsys.readouterr().err
    assert shown.startswith("a   | x\\x0dpayment | paid\t")
    assert not STEERING.search(shown.replace("\t", ""))
    assert shown.count("\n") == 1


def test_a_cell_stays_in_its_row() -> None:
    shown = table([("a\nb", HOSTILE), ("c", "d")])
    assert len(shown.splitlines()) == 2
    assert not STEERING.search(shown)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("command", [["audit", "tail"], ["why", "a-0"]])
def test_records_of_hostile_peers_are_plain(run: Callable, place: Path, command: list[str]) -> None:
    record = {"audit_id": "a-0", "ts": 1, "seq": 0, "prev": "0" * 64, "event": "refusal", "step": 4}
    record |= {name: f"{name}\n{HOSTILE}" for name in ("iss", "aud", "cap", "step_name", "reason")}
    (place / "logs").mkdir()
    (place / "logs" / "x.jsonl").write_text(json.dumps(record) + "\n")
    shown = run(*command, "--audit", str(place / "logs")).out
    assert "\\x1b]52" in shown
    assert not STEERING.search(shown)
    assert not [line for line in shown.splitlines() if line.startswith("\\x1b")], "no line of its own"


def test_numbers_stand_with_their_nouns_and_names_with_their_articles() -> None:
    assert [counted(number, "agent") for number in (0, 1, 2)] == ["0 agents", "1 agent", "2 agents"]
    assert counted(2, "authority", "authorities") == "2 authorities"
    with pytest.raises(PayloadError, match="holds an object,"):
        convert_payload({"x": object()})
    with pytest.raises(PayloadError, match="holds a complex,"):
        convert_payload({"x": 1j})


def test_what_nobody_reads_any_more_hinders_nothing() -> None:
    """As after ``agentweave up 2>&1 | tee log``, when tee is gone: neither here nor at the end of the process."""
    code = (
        "import sys\nfrom agentweave_bus.cli.output import message, show_line\nsys.stdin.readline()\n"
        "message('one')\nshow_line('hello', 5, 'two')\nmessage('three')\nprint('goes on')"
    )
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=writing, text=True
    )
    os.close(writing)
    os.close(reading)
    said, _ = process.communicate("\n", timeout=30)
    assert (process.returncode, said) == (0, "goes on\n")
