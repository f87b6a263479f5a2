"""``make demo``: it succeeds, it fails when what it shows does not happen, and it leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

SHOP_GRANTS = Path("workers/ecommerce/grants.yaml")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """What the demo gets as its temporary directory; pytest's own is too deep for a unix socket."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as directory:
        yield Path(directory)


def demo(scratch: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "workers.ecommerce.demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output, errors


def assert_nothing_is_left(scratch: Path, output: str) -> None:
    assert list(scratch.iterdir()) == []
    told = re.search(r"pid of (.*)", output)
    assert told is not None, output
    pids = re.findall(r"\d+", told[1])
    assert len(pids) == 6
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


@pytest.mark.slow  # the demo, again; the README's test runs it, too
def test_it_shows_what_it_promises(scratch: Path) -> None:
    code, output, errors = ended(demo(scratch))
    assert (code, errors) == (0, ""), output + errors
    assert output.count("\n  ok  ") == int(re.search(r"All (\d+) checks", output)[1])
    for line in (
        r"on whose behalf was payment asked\? +client/web → gateway → order, for alice",
        r"order asks user for update_tier +denied by order's own policy",
        r"its own policy left out +denied by the broker",
        r"lets all pass +denied by user, step 11 \(authorization\)",
        r"admin → user: update_tier +allowed: tier free → premium",
        r"one byte altered +refused by payment, step \d",
        r"a second time +refused by payment, step 9 \(replay\)",
        r"started anew +refused by payment, step 9 \(replay\)",
        r"in order's name +refused by inventory, step \d",
        r"the card has expired +failed, and undone: the goods are released",
        r"killed once it is paid +paid, not confirmed, and its process is gone",
        r"another order's outcome there +believed by nobody: the task is still at work",
        r"killed after paying +order \w+… confirmed at attempt \d, charged once",
        r"its address opens the console +once; the second time, and without a token: refused",
        r"what the console shows +6 agents at work; tasks: 1 completed, 1 failed",
        r"audit logs of all .* no change, gap or cut",
    ):
        assert re.search(line, output), line
    assert "\x1b" not in output
    assert_nothing_is_left(scratch, output)


@pytest.mark.slow  # the demo, again; the README's test runs it, too
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "capabilities: [get_user]",
            "capabilities: [get_user, update_tier]",
            "FAILED  order asks user for update_tier",
        ),
        (
            'health]\n    principals: ["https://login.shop.example"]',
            'health]\n    principals: ["https://login.other.example"]',
            "FAILED  client/web → gateway → user: create_user",
        ),
    ],
    ids=["order-may-change-tiers", "no-principal"],
)
def test_it_fails_when_a_promise_does_not_hold(
    scratch: Path, tmp_path: Path, old: str, new: str, says: str
) -> None:
    grants = SHOP_GRANTS.read_text()
    assert grants.count(old) == 1
    changed = tmp_path / "grants.yaml"
    changed.write_text(grants.replace(old, new))
    code, output, _ = ended(demo(scratch, "--grants", str(changed)))
    assert code == 1, output
    assert says in output
    assert "It did NOT go as told" in output
    assert_nothing_is_left(scratch, output)


@pytest.mark.slow  # the demo, again; the README's test runs it, too
def test_ctrl_c_ends_it_and_leaves_nothing_behind(scratch: Path) -> None:
    process = demo(scratch)
    assert process.stdout is not None
    seen = ""
    try:
        while "create_order" not in seen:  # ends with the pipe if the demo does
            line = process.stdout.readline()
            assert line, seen
            seen += line
    finally:
        process.send_signal(signal.SIGINT)
    code, output, errors = ended(process)
    assert code == 130, output + errors
    assert "nothing is left running" in errors
    assert_nothing_is_left(scratch, seen + output)


@pytest.mark.slow  # the demo, again
def test_it_stays_open_where_that_is_asked_for(scratch: Path) -> None:
    process = demo(scratch, "--hold")
    assert process.stdout is not None
    seen = ""
    try:
        while "stays open" not in seen:  # ends with the pipe if the demo does
            line = process.stdout.readline()
            assert line, seen
            seen += line
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with browser.open(re.findall(r"http://\S+token=\S+", seen)[-1], timeout=10) as page:
            assert "<title>" in page.read().decode()
    finally:
        process.send_signal(signal.SIGINT)
    code, output, errors = ended(process)
    assert code == 130, output + errors
    assert_nothing_is_left(scratch, seen + output)
