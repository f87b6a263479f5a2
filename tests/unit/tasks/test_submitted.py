"""What an identity has submitted, by its own audit log: enough to cancel a task by its name alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentweave_bus import SecureAgent, capability
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.record import TaskRef
from agentweave_bus.tasks.schedule import Schedule
from agentweave_bus.tasks.submitted import ParkedSubmissions, submission_of, submitted_tasks
from agentweave_bus.testing import MemoryBus

ME = SpiffeID("spiffe://a.test/client/cli")
AGENT = "spiffe://a.test/agent/x"
IDS = [f"01890a5d-ac96-774b-bcce-b302099a805{n}" for n in range(3)]


def record(number: int = 0, **changed: Any) -> dict[str, Any]:
    values = {
        "event": "submit",
        "iss": str(ME),
        "aud": AGENT,
        "cap": "work",
        "id": IDS[number],
        "digest": f"0{number}" * 32,
        "pd": "aa" * 32,
        "ts": 1_000 + number,
    }
    return values | changed


def write(folder: Path, *records: object, number: int = 1) -> Path:
    file = folder / f"cli.20250101T000000Z.{'0' * 32}.{number:04d}.jsonl"
    file.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in records))
    return folder / "cli.jsonl"


def test_tasks_come_in_their_order_each_once(tmp_path: Path) -> None:
    again = record(0, ts=9_000, digest="0f" * 32)
    log = write(tmp_path, record(1), record(0), again, record(2))
    found = submitted_tasks(log, ME)
    assert [one.ref.id for one in found] == [IDS[1], IDS[2], IDS[0]]
    assert found[-1].digest == bytes.fromhex("0f" * 32)
    assert (str(found[0].ref.agent), found[0].ref.sender, found[0].at_ms) == (AGENT, ME, 1_001)
    assert [one.ref.id for one in submitted_tasks(log, ME, task_id=IDS[2])] == [IDS[2]]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '["submit"]',
        record(event="call"),
        record(iss="spiffe://a.test/client/other"),
        record(digest="zz"),
        record(pd="aa"),
        record(pd=None),
        record(ts="yesterday"),
        record(cap=7),
        record(aud="somebody"),
        record(aud="spiffe://a.test"),
        {key: value for key, value in record().items() if key != "pd"},
    ],
)
def test_what_is_no_submission_of_mine_is_left_out(tmp_path: Path, line: object) -> None:
    log = write(tmp_path, line, record(1))
    assert [one.ref.id for one in submitted_tasks(log, ME)] == [IDS[1]]


def test_where_there_is_no_log_nothing_was_submitted(tmp_path: Path) -> None:
    assert submitted_tasks(tmp_path / "none" / "cli.jsonl", ME) == []


def ref(number: int) -> TaskRef:
    return TaskRef(SpiffeID(AGENT), ME, "work", IDS[number])


def test_when_tasks_are_due_is_read_as_the_log_grows(tmp_path: Path) -> None:
    due = {"nbf": 5_000, "exp": 9_000}
    log = write(tmp_path, record(0, **due), record(1))
    parked = ParkedSubmissions(log, ME)
    assert parked.schedule_of(ref(0)) == Schedule(5_000, 9_000)
    assert parked.schedule_of(ref(1)) is None
    (file,) = tmp_path.iterdir()
    later = json.dumps(record(2, **due, every="1h"))
    with file.open("a") as lines:
        lines.write(later[:40])
        lines.flush()
        assert parked.schedule_of(ref(2)) is None
        lines.write(f"{later[40:]}\n")
    assert parked.schedule_of(ref(2)) == Schedule(5_000, 9_000, "1h")
    write(tmp_path, record(0, nbf=6_000, exp=9_000), number=2)
    assert parked.schedule_of(ref(0)) == Schedule(6_000, 9_000)


@pytest.mark.parametrize(
    "told", [{"nbf": "soon"}, {"exp": None}, {"every": 7}, {"every": "often"}, {"iss": "spiffe://a.test/x"}]
)
def test_what_is_no_time_of_mine_is_not_told(tmp_path: Path, told: dict[str, Any]) -> None:
    log = write(tmp_path, record(0, **{"nbf": 5_000, "exp": 9_000} | told), record(1, nbf=1, exp=2))
    parked = ParkedSubmissions(log, ME)
    assert parked.schedule_of(ref(0)) is None
    assert parked.schedule_of(ref(1)) == Schedule(1, 2)


def test_where_there_is_no_log_nothing_is_due(tmp_path: Path) -> None:
    assert ParkedSubmissions(tmp_path / "none" / "cli.jsonl", ME).schedule_of(ref(0)) is None


class Idle(SecureAgent):
    """Takes tasks that nobody here starts."""

    @capability("work")
    async def work(self, n: int = 0) -> dict[str, int]:
        """Return what came."""
        return {"n": n}


@pytest.mark.anyio
async def test_a_submission_is_found_as_it_was_made(bus: MemoryBus) -> None:
    await bus.grant("client/cli", "agent/idle", "work")
    await bus.start(Idle)
    client = await bus.client("client/cli")
    handle = await client.submit(str(bus.id("agent/idle")), "work", {"n": 7})
    log = client.config.authorization.audit.path
    found = submission_of(log, handle._ref)
    assert found is not None
    assert (found.digest.hex(), found.pd.hex()) == (handle.digest, handle._pd)
    named = client.task(handle.reference)
    await named._remember()
    assert (named.digest, named._pd) == (handle.digest, handle._pd)
    assert (await named.result(10)).data == {"n": 7}
