"""The line in which a worker says how it is, and the pipe on which it does."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentweave_bus.observability.heartbeat import BEAT_SECONDS, READY_FD, Heartbeat, SupervisorPipe

SECONDS = st.floats(-1e6, 1e15)
COUNTS = st.integers(0, 2**52)
BEATS = st.builds(
    Heartbeat,
    *(SECONDS, COUNTS, COUNTS, COUNTS, st.booleans()),
    *(st.none() | SECONDS, st.none() | SECONDS, st.none() | COUNTS),
)
WELL = Heartbeat(0.0, 1, 2, 3, connected=True)


@given(BEATS)
def test_what_is_told_is_read(beat: Heartbeat) -> None:
    word, _, told = beat.line().decode().partition(" ")
    assert (word, Heartbeat.read(told)) == ("beat", beat)


@pytest.mark.parametrize(
    "change",
    [
        {"lag_s": None}, {"lag_s": "1"}, {"in_flight": 1.0}, {"handled": True}, {"resident": 2**53},
        {"connected": 1}, {"idle_s": 10**400}, {"svid_s": float("inf")}, {"lag_s": float("nan")}, {"more": 1},
        {"backlog": 1.0}, {"backlog": 2**53},
    ],
)  # fmt: skip
def test_what_is_no_heartbeat(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"no heartbeat|Exceeds"):
        Heartbeat.read(json.dumps(WELL._asdict() | change))


@pytest.mark.parametrize("text", ["", "[]", "7", "{}", "[" * 100_000])
def test_nor_is_anything_else(text: str) -> None:
    with pytest.raises(ValueError):
        Heartbeat.read(text)


def test_a_full_pipe_loses_beats_and_nobody_waits() -> None:
    reading, writing = os.pipe()
    try:
        pipe = SupervisorPipe({READY_FD: str(writing), BEAT_SECONDS: "0.5"})
        assert pipe.every_s == 0.5
        assert os.get_inheritable(writing) is False
        pipe.ready("http://127.0.0.1:1/metrics")
        for _ in range(10_000):
            pipe.beat(WELL)
        lines = os.read(reading, 1 << 20).splitlines()
        assert lines[0] == b"ready http://127.0.0.1:1/metrics"
        assert set(lines[1:-1]) == {WELL.line().rstrip()}
    finally:
        os.close(reading)
        os.close(writing)


def test_without_a_supervisor_nobody_is_told() -> None:
    for environment in ({}, {READY_FD: "nonsense"}, {READY_FD: "999999"}):
        pipe = SupervisorPipe(environment)
        pipe.ready(None)
        pipe.beat(WELL)
        assert pipe.every_s is None
