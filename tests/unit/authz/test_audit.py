from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
import threading
from decimal import Decimal
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from agentweave_bus.authz import AuditLog, LogWitness
from agentweave_bus.exceptions import AuditError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INPUT = {
    "caller_spiffe_id": "spiffe://a.io/x",
    "context": {
        "payload": {
            "card_number": "4111",
            "items": [{"card_number": "4222", "sku": "a"}],
            "customer": {"name": "Anna", "city": "Bern"},
            "name": "order",
        },
        "principal": {"sub": "anna", "card_number": "1"},
    },
}


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AuditLog]:
    log = AuditLog(tmp_path / "order.log", "order/1")
    yield log
    log.close()


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(path)]


class TestAppend:
    def test_each_record_carries_the_hash_of_the_line_before(self, log: AuditLog) -> None:
        entries = [log.append({"event": "decision", "n": n}) for n in range(3)]
        written = lines(log.file)
        parsed = [json.loads(line) for line in written]
        assert [record["seq"] for record in parsed] == [0, 1, 2, 3]
        assert parsed[0]["prev"] == "00" * 32
        for before, record in zip(written, parsed[1:], strict=False):
            assert record["prev"] == sha256(before).hexdigest()
        assert entries[2].hash == sha256(written[3]).digest()
        assert [entry.audit_id for entry in entries] == [record["audit_id"] for record in parsed[1:]]
        assert entries[2].audit_id == f"{log.chain}-3"

    def test_the_operating_system_has_it_when_append_returns(self, log: AuditLog) -> None:
        log.append({"event": "decision", "reason": "grün\n\u2028"})
        assert records(log.file)[-1]["reason"] == "grün\n\u2028"

    def test_a_chain_begins_with_who_wrote_it_and_ends_with_its_end(self, tmp_path: Path) -> None:
        log = AuditLog(tmp_path / "order.log", "order/1")
        log.close()
        log.close()
        first, last = records(log.file)
        assert (first["event"], first["version"], first["instance"]) == ("start", 1, "order/1")
        assert (first["chain"], first["previous"], last["event"]) == (log.chain, [], "end")
        with pytest.raises(AuditError, match="closed"):
            log.append({"event": "decision"})

    def test_decimals_keep_their_digits_as_numbers(self, log: AuditLog) -> None:
        amounts = [Decimal("12.50"), Decimal("1E+20"), Decimal("-0.0000001"), Decimal(2**100)]
        log.append({"event": "decision", "input": {"amounts": amounts, "text": '"1.5"'}})
        written = lines(log.file)[-1]
        assert (
            b'"amounts":[12.50,100000000000000000000,-0.0000001,1267650600228229401496703205376]' in written
        )
        assert json.loads(written)["input"]["text"] == '"1.5"'

    @pytest.mark.parametrize(
        "value",
        [float("nan"), float("inf"), Decimal("NaN"), Decimal("1e999999"), {1, 2}, b"raw", object()],
    )
    def test_what_is_no_json_is_refused_and_leaves_no_gap(self, log: AuditLog, value: object) -> None:
        with pytest.raises(AuditError, match="no JSON"):
            log.append({"event": "decision", "value": value})
        assert log.append({"event": "decision"}).seq == 1

    @pytest.mark.parametrize("key", ["audit_id", "ts", "seq", "prev"])
    def test_what_the_log_writes_itself_can_not_be_passed(self, log: AuditLog, key: str) -> None:
        with pytest.raises(AuditError, match="by the log itself"):
            log.append({"event": "decision", key: 1})

    def test_threads_share_one_chain(self, log: AuditLog) -> None:
        def write() -> None:
            for _ in range(200):
                log.append({"event": "decision"})

        threads = [threading.Thread(target=write) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        written = lines(log.file)
        assert [json.loads(line)["seq"] for line in written] == list(range(801))
        assert all(
            json.loads(after)["prev"] == sha256(before).hexdigest() for before, after in pairwise(written)
        )

    def test_only_the_owner_can_read_it(self, tmp_path: Path) -> None:
        log = AuditLog(tmp_path / "new" / "order.log", "x")
        log.keep_frame(b"d" * 32, b"frame")
        log.close()
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()} == {0o600}


class TestDestination:
    def test_a_directory_a_file_or_a_url(self, tmp_path: Path) -> None:
        for destination, stem in (
            (tmp_path, "audit"),
            (tmp_path / "order.log", "order"),
            (f"file://{tmp_path}/pay.jsonl", "pay"),
        ):
            log = AuditLog(destination, "x")
            log.close()
            assert log.file.parent == tmp_path
            assert log.file.name.startswith(f"{stem}.20")

    def test_an_impossible_one_is_refused_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(AuditError, match="no audit log can be written"):
            AuditLog(tmp_path / "file" / "order.log", "x")


class TestRotation:
    def test_a_full_file_is_followed_by_one_that_names_it(self, tmp_path: Path) -> None:
        log = AuditLog(tmp_path / "order.log", "x", max_file_bytes=2000)
        first = log.file
        for _ in range(30):
            log.append({"event": "decision", "filler": "x" * 100})
        log.close()
        files = sorted(tmp_path.glob("order.*.jsonl"))
        assert len(files) >= 3
        assert files[0] == first
        assert all(path.stat().st_size < 2500 for path in files)
        last = lines(first)[-1]
        following = records(files[1])[0]
        assert following["event"] == "rotate"
        assert following["prev"] == sha256(last).hexdigest()
        assert following["previous"] == [
            {
                "file": first.name,
                "chain": log.chain,
                "seq": json.loads(last)["seq"],
                "hash": following["prev"],
            }
        ]
        seqs = [record["seq"] for path in files for record in records(path)]
        assert seqs == list(range(len(seqs)))

    def test_a_new_process_names_where_each_earlier_chain_ended(self, tmp_path: Path) -> None:
        ends = []
        for _ in range(2):
            log = AuditLog(tmp_path / "order.log", "x")
            log.close()
            last = lines(log.file)[-1]
            ends.append((log.file.name, log.chain, 1, sha256(last).hexdigest()))
        AuditLog(tmp_path / "other.log", "y").close()
        third = AuditLog(tmp_path / "order.log", "x")
        third.close()
        named = records(third.file)[0]["previous"]
        assert sorted((p["file"], p["chain"], p["seq"], p["hash"]) for p in named) == sorted(ends)

    def test_a_torn_end_is_named_as_torn(self, tmp_path: Path) -> None:
        log = AuditLog(tmp_path / "order.log", "x")
        log.close()
        whole = lines(log.file)[-1]
        with log.file.open("ab") as file:
            file.write(b'{"audit_id":"')
        after = AuditLog(tmp_path / "order.log", "x")
        after.close()
        assert records(after.file)[0]["previous"] == [
            {
                "file": log.file.name,
                "chain": log.chain,
                "seq": 1,
                "hash": sha256(whole).hexdigest(),
                "torn": 13,
            }
        ]


class TestWitness:
    def test_it_names_a_record_that_is_on_disk_and_follows_the_log(self, tmp_path: Path) -> None:
        log = AuditLog(tmp_path / "order.log", "x")
        entry = log.append({"event": "decision"})
        deadline = threading.Event()
        for _ in range(100):
            reached = log.witness()
            if reached is not None and reached.seq >= entry.seq:
                break
            deadline.wait(0.05)
        assert log.witness() == LogWitness(log.chain, entry.seq, entry.hash)
        log.close()
        assert log.witness() == LogWitness(log.chain, 2, sha256(lines(log.file)[-1]).digest())

    def test_it_lags_until_fsync_has_returned(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # A disk that takes its time can't be had otherwise.
        may_return = threading.Event()
        real = os.fsync
        monkeypatch.setattr(os, "fsync", lambda fd: (may_return.wait(10), real(fd)))
        log = AuditLog(tmp_path / "order.log", "x")
        log.append({"event": "decision"})
        assert log.witness() is None
        may_return.set()
        log.close()
        assert log.witness() is not None

    def test_when_fsync_fails_nothing_more_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(fd: int) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail)  # a failing disk can't be had otherwise
        log = AuditLog(tmp_path / "order.log", "x")
        log._syncer.join(0.2)
        with pytest.raises(AuditError, match="fsync failed: Input/output error"):
            log.append({"event": "decision"})
        assert log.witness() is None
        with pytest.raises(AuditError):
            log.close()

    @pytest.mark.anyio
    async def test_closing_makes_everything_safe(self, tmp_path: Path) -> None:
        log = AuditLog(tmp_path / "order.log", "x")
        for _ in range(10):
            log.append({"event": "decision"})
        await log.aclose()
        reached = log.witness()
        assert reached is not None
        assert reached.seq == 11
        assert not log._syncer.is_alive()


FULL_DISK = """
import resource, signal, sys
from agentweave_bus.authz import AuditLog
from agentweave_bus.exceptions import AuditError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
log = AuditLog(sys.argv[1], "x")
refused = 0
for n in range(10):
    try:
        log.append({"event": "decision", "filler": "x" * 700})
    except AuditError:
        refused += 1
assert refused > 5, refused
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append({"event": "decision", "after": True})
log.close()
"""


class TestFailingWrites:
    def test_a_full_disk_refuses_and_leaves_no_half_line(self, tmp_path: Path) -> None:
        assert resource.RLIMIT_FSIZE is not None
        script = [sys.executable, "-c", FULL_DISK, str(tmp_path / "order.log")]
        done = subprocess.run(script, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        (path,) = tmp_path.glob("*.jsonl")
        written = records(path)
        assert [record["seq"] for record in written] == list(range(len(written)))
        assert written[-2]["after"] is True


class TestRedaction:
    def written(self, tmp_path: Path, *fields: str) -> dict[str, Any]:
        log = AuditLog(tmp_path / "order.log", "x", redact=fields)
        log.append({"event": "decision", "input": INPUT})
        log.close()
        found: dict[str, Any] = records(log.file)[1]["input"]
        return found

    def test_a_name_is_redacted_at_any_depth(self, tmp_path: Path) -> None:
        before = json.dumps(INPUT)
        found = self.written(tmp_path, "card_number")
        payload = found["context"]["payload"]
        assert payload["card_number"] == "[redacted]"
        assert payload["items"] == [{"card_number": "[redacted]", "sku": "a"}]
        assert found["context"]["principal"] == {"sub": "anna", "card_number": "[redacted]"}
        assert payload["customer"] == {"name": "Anna", "city": "Bern"}
        assert json.dumps(INPUT) == before

    def test_a_path_is_redacted_in_its_place_only(self, tmp_path: Path) -> None:
        payload = self.written(tmp_path, "customer.name", "items.sku")["context"]["payload"]
        assert payload["customer"] == {"name": "[redacted]", "city": "Bern"}
        assert payload["items"] == [{"card_number": "4222", "sku": "[redacted]"}]
        assert payload["name"] == "order"

    def test_nothing_configured_changes_nothing(self, tmp_path: Path) -> None:
        assert self.written(tmp_path) == INPUT


class TestFrames:
    def test_a_frame_is_found_by_its_digest_also_by_a_later_process(self, tmp_path: Path) -> None:
        log = AuditLog(tmp_path / "order.log", "x")
        for number in range(5):
            log.keep_frame(bytes([number]) * 32, b"frame %d" % number)
        assert log.find_frame(b"\x03" * 32) == b"frame 3"
        assert log.find_frame(b"\x09" * 32) is None
        log.close()
        later = AuditLog(tmp_path / "order.log", "x")
        assert later.find_frame(b"\x04" * 32) == b"frame 4"
        later.close()

    def test_they_are_bounded_and_the_oldest_go_first(self, tmp_path: Path) -> None:
        log = AuditLog(tmp_path / "order.log", "x", max_frames_bytes=64_000)
        for number in range(300):
            log.keep_frame(number.to_bytes(32), bytes(1000))
        assert sum(path.stat().st_size for path in tmp_path.glob("*.frames")) <= 64_000
        assert log.find_frame((0).to_bytes(32)) is None
        assert log.find_frame((299).to_bytes(32)) is not None
        assert log.find_frame((250).to_bytes(32)) is not None
        log.close()

    def test_what_another_process_still_writes_stays(self, tmp_path: Path) -> None:
        idle = AuditLog(tmp_path / "order.log", "x", max_frames_bytes=64_000)
        idle.keep_frame(b"i" * 32, b"idle")
        busy = AuditLog(tmp_path / "order.log", "x", max_frames_bytes=64_000)
        for number in range(300):
            busy.keep_frame(number.to_bytes(32), bytes(1000))
        assert busy.find_frame(b"i" * 32) == b"idle"
        idle.close()
        for number in range(300):
            busy.keep_frame(number.to_bytes(32), bytes(1000))
        assert busy.find_frame(b"i" * 32) is None
        busy.close()

    def test_they_go_after_their_retention(self, tmp_path: Path) -> None:
        old = AuditLog(tmp_path / "order.log", "x")
        old.keep_frame(b"o" * 32, b"old")
        old.close()
        for path in tmp_path.glob("*.frames"):
            os.utime(path, (1, 1))
        new = AuditLog(tmp_path / "order.log", "x", frame_retention_s=3600)
        new.keep_frame(b"n" * 32, b"new")
        assert new.find_frame(b"o" * 32) is None
        assert new.find_frame(b"n" * 32) == b"new"
        new.close()

    def test_none_are_kept_when_so_configured_and_none_after_the_end(self, tmp_path: Path) -> None:
        log = AuditLog(tmp_path / "order.log", "x", max_frames_bytes=0)
        log.keep_frame(b"d" * 32, b"frame")
        log.close()
        assert list(tmp_path.glob("*.frames")) == []
        closed = AuditLog(tmp_path / "order.log", "x")
        closed.close()
        with pytest.raises(AuditError, match="closed"):
            closed.keep_frame(b"d" * 32, b"frame")
