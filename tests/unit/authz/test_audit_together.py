"""Records of one turn of the event loop are written together, each with its place in the chain."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from agentweave_bus.authz import AuditLog
from agentweave_bus.exceptions import AuditError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.anyio


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AuditLog]:
    log = AuditLog(tmp_path / "order.log", "order/1")
    yield log
    log.close()


def chain(path: Path) -> list[dict[str, Any]]:
    """Read the records, having seen that each has the hash of the line before."""
    lines = path.read_bytes().splitlines()
    for before, line in pairwise(lines):
        assert json.loads(line)["prev"] == sha256(before).hexdigest()
    return [json.loads(line) for line in lines]


def written_to(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def segments_of(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.glob("*.frames")]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is written from now on."""
    sizes: list[int] = []
    write = os.write

    def counted(fd: int, data: bytes) -> int:
        sizes.append(len(data))
        return write(fd, data)

    monkeypatch.setattr("agentweave_bus.authz.audit.os.write", counted)
    return sizes


async def test_one_write_for_a_turn_and_it_is_there_when_record_returns(
    log: AuditLog, writes: list[int]
) -> None:
    async def one(n: int) -> None:
        entry = await log.record({"event": "call", "n": n})
        assert chain(log.file)[entry.seq]["n"] == n

    async with asyncio.TaskGroup() as group:
        for n in range(50):
            group.create_task(one(n))
    assert len(writes) == 1
    assert [record["n"] for record in chain(log.file)[1:]] == list(range(50))


async def test_what_is_appended_meanwhile_keeps_the_order(log: AuditLog) -> None:
    waiting = asyncio.create_task(log.record({"event": "call", "n": 1}))
    await asyncio.sleep(0)
    thread = threading.Thread(target=log.append, args=({"event": "other", "n": 2},))
    thread.start()
    thread.join()
    await waiting
    assert [record["n"] for record in chain(log.file)[1:]] == [1, 2]


async def test_what_nobody_waits_for_is_written_too_and_a_cancelled_waiter_changes_nothing(
    log: AuditLog,
) -> None:
    lost: list[AuditError] = []
    log.record_soon({"event": "outcome", "n": 1}, lost.append)
    cancelled = asyncio.create_task(log.record({"event": "call", "n": 2}))
    await asyncio.sleep(0)
    cancelled.cancel()
    await log.record({"event": "call", "n": 3})
    assert [record["n"] for record in chain(log.file)[1:]] == [1, 2, 3]
    assert lost == []


async def test_what_is_queued_when_the_log_closes_is_written(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "order.log", "order/1")
    log.record_soon({"event": "outcome"}, lambda _error: None)
    log.close()
    assert [record["event"] for record in chain(log.file)] == ["start", "outcome", "end"]


async def test_a_write_that_fails_records_none_of_them_and_the_chain_goes_on(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[AuditError] = []

    def full(_fd: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("agentweave_bus.authz.audit.os.write", full)
        log.record_soon({"event": "outcome", "n": 0}, lost.append)
        results = await asyncio.gather(
            *(log.record({"event": "call", "n": n}) for n in (1, 2)), return_exceptions=True
        )
    assert [type(one) for one in results] == [AuditError, AuditError]
    assert len(lost) == 1
    entry = await log.record({"event": "call", "n": 3})
    assert entry.seq == 1
    assert [record["n"] for record in chain(log.file)[1:]] == [3]


async def test_frames_are_kept_before_the_records_that_name_them_in_one_write(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    write = os.write

    def noted(fd: int, data: bytes) -> int:
        written.append("record" if data.startswith(b"{") else "frames")
        return write(fd, data)

    monkeypatch.setattr("os.write", noted)
    frames = [(bytes([n]) * 32, b"frame %d" % n) for n in range(5)]
    await asyncio.gather(*(log.record({"event": "admission", "n": n}, frame=frames[n]) for n in range(5)))
    assert written == ["frames", "record"]
    assert [log.find_frame(digest) for digest, _ in frames] == [frame for _, frame in frames]


async def test_where_a_frame_can_not_be_kept_nothing_is_recorded(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("agentweave_bus.authz.frames.FrameStore._write", _no_space)
        results = await asyncio.gather(
            log.record({"event": "admission", "n": 1}, frame=(b"d" * 32, b"frame")),
            log.record({"event": "call", "n": 2}),
            return_exceptions=True,
        )
    assert [type(one) for one in results] == [AuditError, AuditError]
    await log.record({"event": "admission", "n": 3}, frame=(b"e" * 32, b"later"))
    assert [record["n"] for record in chain(log.file)[1:]] == [3]
    assert log.find_frame(b"d" * 32) is None


async def test_frames_that_are_more_than_a_segment_each_have_their_own(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "order.log", "order/1", max_frames_bytes=16_000)
    frames = [(bytes([n]) * 32, bytes([n]) * 700) for n in range(9)]
    await asyncio.gather(*(log.record({"event": "admission"}, frame=one) for one in frames))
    assert log.find_frame(frames[-1][0]) == frames[-1][1]
    sizes = segments_of(tmp_path)
    assert len(sizes) == 9
    assert sum(sizes) <= 16_000
    log.close()


def _no_space(*_: object) -> int:
    raise OSError(28, "No space left on device")


async def test_several_are_recorded_in_one_write_or_none_counts(
    log: AuditLog, writes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    await log.record_all([{"event": "submit", "n": n} for n in range(5)])
    assert len(writes) == 1

    def full(_fd: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("agentweave_bus.authz.audit.os.write", full)
        with pytest.raises(AuditError, match="No space left"):
            await log.record_all([{"event": "submit", "n": n} for n in (5, 6)])
    with pytest.raises(AuditError, match="no JSON"):
        await log.record_all([{"event": "submit", "n": 7}, {"event": "submit", "n": object()}])
    await log.record_all([])
    assert [record["n"] for record in chain(log.file)[1:]] == [*range(5)]


async def test_a_full_file_is_followed_by_one_that_names_it(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "order.log", "order/1", max_file_bytes=2_000)
    await asyncio.gather(*(log.record({"event": "call", "text": "x" * 300}) for _ in range(20)))
    await log.aclose()
    files = written_to(tmp_path)
    assert len(files) > 2
    lines = [line for file in files for line in file.read_bytes().splitlines()]
    for before, line in pairwise(lines):
        assert json.loads(line)["prev"] == sha256(before).hexdigest()


async def test_the_witness_is_never_ahead_of_what_is_written(log: AuditLog) -> None:
    waiting = asyncio.create_task(log.record({"event": "call"}))
    await asyncio.sleep(0)
    log._sync()
    witness = log.witness()
    assert witness is not None
    assert witness.seq == 0
    await waiting
