from __future__ import annotations

import json
import random
import shutil
import tracemalloc
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agentweave_bus.authz import AuditLog, AuditReport, SignedNote, audit_report, verify_audit
from agentweave_bus.exceptions import AuditError, FederationError, SignatureRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from agentweave_bus.authz import EvidenceCheck


def note(log: AuditLog, evidence: bytes = b"link") -> dict[str, object]:
    """Return what a peer writes about ``log`` when a signed head with its witness has arrived."""
    reached = log.witness()
    assert reached is not None
    carried = b64encode(evidence).decode()
    return {
        "witness": {
            "chain": reached.chain,
            "seq": reached.seq,
            "hash": reached.hash.hex(),
            "evidence": carried,
        }
    }


def wait_until_on_disk(log: AuditLog, seq: int) -> None:
    for _ in range(200):
        reached = log.witness()
        if reached is not None and reached.seq >= seq:
            return
        log._closing.wait(0.02)
    raise AssertionError("it never reached the disk")


def write(path: Path, count: int = 5, *, instance: str = "x", max_file_bytes: int = 10**6) -> AuditLog:
    log = AuditLog(path, instance, max_file_bytes=max_file_bytes)
    for number in range(count):
        log.append({"event": "decision", "n": number})
    log.close()
    return log


def kinds(report: AuditReport) -> set[str]:
    return {problem.kind for problem in report.problems}


def edit(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    lines = path.read_bytes().split(b"\n")[:-1]
    path.write_bytes(b"".join(line + b"\n" for line in change(lines)))


class TestSound:
    def test_an_untouched_log_verifies_and_its_limits_are_told(self, tmp_path: Path) -> None:
        log = write(tmp_path / "order.log", instance="order/1")
        report = verify_audit([tmp_path])
        assert report.ok
        assert report.records == 7
        (chain,) = report.chains
        assert (chain.chain, chain.instance, chain.first_seq, chain.last_seq) == (log.chain, "order/1", 0, 6)
        assert (chain.ended, chain.named_to, chain.witnessed_to) == (True, -1, -1)
        assert any("nobody else vouches" in sentence for sentence in report.cannot_show)
        assert json.loads(json.dumps(report.to_json()))["ok"] is True

    def test_rotated_files_are_one_chain_whatever_they_are_called(self, tmp_path: Path) -> None:
        write(tmp_path / "order.log", 40, max_file_bytes=1000)
        files = sorted(tmp_path.glob("*.jsonl"))
        assert len(files) > 3
        for number, path in enumerate(reversed(files)):
            path.rename(tmp_path / f"{number}.jsonl")
        report = verify_audit([tmp_path, tmp_path])
        assert report.ok, report.problems
        assert len(report.chains) == 1

    def test_a_restart_vouches_for_the_chain_before(self, tmp_path: Path) -> None:
        first = write(tmp_path / "order.log")
        write(tmp_path / "order.log")
        report = verify_audit([tmp_path])
        assert report.ok
        by_id = {chain.chain: chain for chain in report.chains}
        assert by_id[first.chain].named_to == 6
        assert any(
            sentence.startswith(f"chain {first.chain}: only a later chain of the same log vouches for it")
            for sentence in report.cannot_show
        )

    def test_nothing_to_check_is_no_clean_bill(self, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="holds no audit log"):
            verify_audit([tmp_path])
        with pytest.raises(AuditError, match="can't be read: No such file"):
            verify_audit([tmp_path / "absent.jsonl"])


class TestGaps:
    def test_a_log_of_gaps_is_checked_in_little_memory(self, tmp_path: Path) -> None:
        """Each record may leave out a million numbers: were those kept, two kilobytes took a gigabyte."""
        chain, previous, lines = "ab" * 16, "00" * 32, []
        for seq in range(0, 30 * 1_000_001, 1_000_001):
            record = {"audit_id": f"{chain}-{seq}", "ts": 1, "seq": seq, "prev": previous, "event": "x"}
            lines.append(json.dumps(record).encode())
            previous = sha256(lines[-1]).hexdigest()
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        tracemalloc.start()
        try:
            report = verify_audit([tmp_path])
            assert tracemalloc.get_traced_memory()[1] < 2_000_000
        finally:
            tracemalloc.stop()
        assert [problem.kind for problem in report.problems] == ["changed", *["gap"] * 29]

    def test_a_hash_is_known_by_its_number_beyond_a_gap(self) -> None:
        chain = audit_report._Chain(0)
        digests = {seq: bytes([seq % 251 + 1]) * 32 for seq in (0, 1, 15, 16, 40, 5_000_000, 17, 3)}
        for seq, digest in digests.items():
            chain.put(seq, digest)
        assert {seq: chain.hash_at(seq) for seq in digests} == digests
        assert [chain.hash_at(seq) for seq in (2, 14, 18, 39, 41, 4_999_999, 5_000_001)] == [None] * 7


class TestChanges:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return write(tmp_path / "order.log", 10).file

    def test_any_changed_byte_but_of_the_last_line_is_found(self, path: Path) -> None:
        original = path.read_bytes()
        last_line = original[:-1].rfind(b"\n") + 1
        chosen = random.Random(7)
        for _ in range(300):
            at = chosen.randrange(last_line)
            changed = bytearray(original)
            changed[at] ^= 1 << chosen.randrange(8)
            path.write_bytes(changed)
            assert not verify_audit([path]).ok, (at, original[at - 20 : at + 20])

    def test_a_changed_record_is_found_where_it_is(self, path: Path) -> None:
        edit(path, lambda lines: [line.replace(b'"n":3', b'"n":4') for line in lines])
        report = verify_audit([path])
        assert kinds(report) == {"changed"}
        assert [problem.line for problem in report.problems] == [6]

    def test_a_removed_record(self, path: Path) -> None:
        edit(path, lambda lines: lines[:4] + lines[5:])
        report = verify_audit([path])
        assert kinds(report) == {"gap"}
        assert "record 4 is missing" in report.problems[0].sentence

    def test_several_removed_records(self, path: Path) -> None:
        edit(path, lambda lines: lines[:4] + lines[7:])
        assert "record 4 to 6 is missing" in verify_audit([path]).problems[0].sentence

    def test_swapped_and_doubled_records(self, path: Path) -> None:
        original = path.read_bytes()
        edit(path, lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]])
        assert "reordered" in kinds(verify_audit([path]))
        path.write_bytes(original)
        edit(path, lambda lines: [*lines[:4], *lines[3:]])
        assert "reordered" in kinds(verify_audit([path]))

    def test_a_cut_beginning(self, path: Path) -> None:
        edit(path, lambda lines: lines[3:])
        assert kinds(verify_audit([path])) == {"missing"}

    def test_an_inserted_line_and_an_empty_one(self, path: Path) -> None:
        original = path.read_bytes()
        for line in (b"", b"hello", b"[]", b'{"audit_id":"x-0"}', b"\xff"):
            path.write_bytes(original)
            edit(path, lambda lines, line=line: [*lines[:3], line, *lines[3:]])  # type: ignore[misc]
            assert "malformed" in kinds(verify_audit([path]))

    def test_a_torn_line_and_an_emptied_file(self, path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-4])
        assert kinds(verify_audit([path])) == {"cut"}
        path.write_bytes(path.read_bytes()[:10])
        assert kinds(verify_audit([path])) == {"cut"}
        path.write_bytes(b"")
        assert kinds(verify_audit([path])) == {"cut"}

    def test_a_record_after_the_end_and_a_chain_without_its_start(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")[:-1]
        chain = json.loads(lines[0])["chain"]
        prev = sha256(lines[-1]).hexdigest()
        forged = {"audit_id": f"{chain}-12", "ts": 1, "seq": 12, "prev": prev, "event": "decision"}
        path.write_bytes(path.read_bytes() + json.dumps(forged).encode() + b"\n")
        assert kinds(verify_audit([path])) == {"changed"}
        forged |= {"audit_id": f"{chain}-0", "seq": 0, "prev": "00" * 32}
        path.write_bytes(json.dumps(forged).encode() + b"\n")
        assert kinds(verify_audit([path])) == {"changed"}

    def test_a_huge_number_costs_no_memory(self, path: Path) -> None:
        chain = json.loads(path.read_bytes().split(b"\n")[0])["chain"]
        for seq in (2**39, 10**30):
            forged = {
                "audit_id": f"{chain}-{seq}",
                "ts": 1,
                "seq": seq,
                "prev": "00" * 32,
                "event": "decision",
            }
            path.write_bytes(path.read_bytes() + json.dumps(forged).encode() + b"\n")
        assert "malformed" in kinds(verify_audit([path]))

    def test_a_missing_file_in_the_middle(self, tmp_path: Path) -> None:
        write(tmp_path / "pay.log", 40, max_file_bytes=1000)
        files = sorted(tmp_path.glob("pay.*.jsonl"))
        files[1].unlink()
        assert "gap" in kinds(verify_audit(tmp_path.glob("pay.*.jsonl")))

    def test_a_record_moved_into_another_chains_file(self, path: Path, tmp_path: Path) -> None:
        other = write(tmp_path / "other.log", 3)
        stray = other.file.read_bytes().split(b"\n")[1]
        edit(path, lambda lines: [*lines[:3], stray, *lines[3:]])
        assert "reordered" in kinds(verify_audit([path, other.file]))


class TestRestart:
    def test_a_log_replaced_after_a_restart_is_found(self, tmp_path: Path) -> None:
        log = write(tmp_path / "order.log")
        write(tmp_path / "order.log")
        edit(log.file, lambda lines: [*lines[:-1], lines[-1].replace(b'"end"', b'"bye"')])
        report = verify_audit([tmp_path])
        assert kinds(report) == {"changed"}
        assert "the next chain of its log saw" in report.problems[0].sentence

    def test_a_log_cut_after_a_restart_is_found(self, tmp_path: Path) -> None:
        log = write(tmp_path / "order.log")
        write(tmp_path / "order.log")
        edit(log.file, lambda lines: lines[:-3])
        report = verify_audit([tmp_path])
        assert kinds(report) == {"cut"}
        assert "ends at record 3" in report.problems[0].sentence

    def test_a_log_removed_after_a_restart_is_found(self, tmp_path: Path) -> None:
        log = write(tmp_path / "order.log")
        write(tmp_path / "order.log")
        log.file.unlink()
        assert kinds(verify_audit([tmp_path])) == {"missing"}

    def test_a_crash_in_the_middle_of_a_record_is_a_note_once_the_next_chain_tells_it(
        self, tmp_path: Path
    ) -> None:
        log = write(tmp_path / "order.log")
        with log.file.open("ab") as file:
            file.write(b'{"audit_id":')
        assert kinds(verify_audit([tmp_path])) == {"cut"}
        write(tmp_path / "order.log")
        report = verify_audit([tmp_path])
        assert report.ok, report.problems
        assert len(report.notes) == 1
        with log.file.open("ab") as file:
            file.write(b'"more')
        assert kinds(verify_audit([tmp_path])) == {"cut"}


ORDER, PAYMENT, STRANGER = (f"spiffe://shop.test/agent/{name}" for name in ("order", "payment", "x"))


def signed_by(signer: str) -> EvidenceCheck:
    """Take the evidence of these tests for a head that ``signer`` signed."""

    def check(evidence: bytes, noted_ms: int) -> SignedNote:
        assert noted_ms > 1_700_000_000_000
        chain, seq, digest = json.loads(evidence)
        return SignedNote(signer, (chain, seq, bytes.fromhex(digest)))

    return check


def said_of(chain: str, seq: int, digest: str) -> dict[str, object]:
    """Return a peer's note of a signed head with such a statement."""
    evidence = b64encode(json.dumps([chain, seq, digest]).encode()).decode()
    return {"witness": {"chain": chain, "seq": seq, "hash": digest, "evidence": evidence}}


class TestPeers:
    """Payment notes in its log how far order's had come when order called it."""

    @pytest.fixture
    def logs(self, tmp_path: Path) -> tuple[Path, Path]:
        order, payment = (
            AuditLog(tmp_path / "a" / "order.log", f"{ORDER} pid 7"),
            AuditLog(tmp_path / "b" / "pay.log", f"{PAYMENT} pid 8"),
        )
        for number in range(5):
            order.append({"event": "decision", "n": number})
        wait_until_on_disk(order, 5)
        reached = order.witness()
        assert reached is not None
        head = json.dumps([reached.chain, reached.seq, reached.hash.hex()]).encode()
        payment.append({"event": "decision", **note(order, head)})
        order.append({"event": "decision", "n": "after"})
        order.close()
        payment.close()
        return order.file, payment.file

    def test_an_honest_pair_verifies_as_far_as_it_was_seen(self, logs: tuple[Path, Path]) -> None:
        report = verify_audit(logs)
        assert report.ok, report.problems
        assert [chain.witnessed_to for chain in report.chains if chain.instance == f"{ORDER} pid 7"] == [5]
        assert [chain.witnessed_to for chain in report.chains].count(-1) == 1
        assert any("after record 5 nobody else vouches" in sentence for sentence in report.cannot_show)
        assert any(
            "signatures under what peers noted were not checked" in line for line in report.cannot_show
        )

    def test_a_log_cut_below_what_a_peer_saw_is_found(self, logs: tuple[Path, Path]) -> None:
        edit(logs[0], lambda lines: lines[:4])
        assert verify_audit([logs[0]]).ok, "alone it looks whole"
        report = verify_audit(logs, evidence_check=signed_by(ORDER))
        assert kinds(report) == {"cut"}
        assert "ends at record 3, but a peer (proved by a signature) saw 5" in report.problems[0].sentence

    def test_an_unverified_word_against_a_chain_is_a_note(self, logs: tuple[Path, Path]) -> None:
        edit(logs[0], lambda lines: lines[:4])
        report = verify_audit(logs)
        assert report.ok, "anybody could have written it"
        assert [note.kind for note in report.notes] == ["cut"]
        assert "ends at record 3, but a peer (by its log's word) saw 5" in report.notes[0].sentence
        assert any("nothing is called cut or replaced" in line for line in report.cannot_show)

    def test_a_log_written_anew_from_some_record_on_is_found(
        self, logs: tuple[Path, Path], tmp_path: Path
    ) -> None:
        lines = logs[0].read_bytes().split(b"\n")[:-1]
        forged = rechained(lines, 3, b'"n":2', b'"n":99')
        logs[0].write_bytes(b"".join(line + b"\n" for line in forged))
        assert verify_audit([logs[0]]).ok, "alone it looks whole"
        assert [note.kind for note in verify_audit(logs).notes] == ["changed"]
        report = verify_audit(logs, evidence_check=signed_by(ORDER))
        assert kinds(report) == {"changed"}
        assert logs[1].name == report.problems[0].file

    def test_what_nobody_saw_can_be_cut_and_the_report_says_so(self, logs: tuple[Path, Path]) -> None:
        edit(logs[0], lambda lines: lines[:7])
        report = verify_audit(logs)
        assert report.ok
        assert any("after record 5" in line and "cut off or replaced" in line for line in report.cannot_show)

    def test_that_a_peers_log_was_not_given_is_told(self, logs: tuple[Path, Path]) -> None:
        report = verify_audit([logs[1]])
        assert report.ok
        assert any("not given: kept elsewhere" in sentence for sentence in report.cannot_show)

    def test_ones_own_word_is_no_witness(self, tmp_path: Path) -> None:
        log = AuditLog(tmp_path / "order.log", "o")
        wait_until_on_disk(log, 0)
        log.append({"event": "decision", **note(log)})
        log.close()
        report = verify_audit([tmp_path])
        assert report.ok
        assert report.chains[0].witnessed_to == -1

    def test_evidence_is_checked_with_what_was_signed(self, logs: tuple[Path, Path]) -> None:
        report = verify_audit(logs, evidence_check=signed_by(ORDER))
        assert report.ok, report.problems
        assert not report.notes
        assert max(chain.witnessed_to for chain in report.chains) == 5
        assert not any("were not checked" in sentence for sentence in report.cannot_show)

    @pytest.mark.parametrize("seq", [3, 400, 2**39, 2**52])
    def test_a_stranger_s_word_about_a_chain_is_told_of_the_stranger(
        self, logs: tuple[Path, Path], tmp_path: Path, seq: int
    ) -> None:
        chain = logs[0].name.split(".")[2]
        third = AuditLog(tmp_path / "c" / "third.log", "spiffe://shop.test/agent/third pid 9")
        third.append({"event": "admission", **said_of(chain, seq, "ab" * 32)})
        third.close()
        report = verify_audit([logs[0], third.file], evidence_check=signed_by(STRANGER))
        assert report.ok, report.problems
        (note,) = report.notes
        assert (note.kind, note.file) == ("evidence", third.file.name)
        assert note.sentence.startswith(f"{STRANGER} spoke of chain {chain}, whose start record names")
        assert {summary.witnessed_to for summary in report.chains} == {-1}

    def test_a_stranger_s_copy_of_a_true_word_does_not_take_its_place(
        self, logs: tuple[Path, Path], tmp_path: Path
    ) -> None:
        said = next(json.loads(line) for line in logs[1].read_bytes().splitlines() if b"witness" in line)
        third = AuditLog(tmp_path / "0" / "third.log", "spiffe://shop.test/agent/third pid 9")
        third.append({"event": "admission", "witness": said["witness"]})
        third.close()
        signers = {said["ts"]: ORDER}

        def check(evidence: bytes, noted_ms: int) -> SignedNote:
            return SignedNote(signers.get(noted_ms, STRANGER), signed_by("")(evidence, noted_ms).log)

        edit(logs[0], lambda lines: lines[:4])
        assert kinds(verify_audit([third.file, *logs], evidence_check=check)) == {"cut"}

    def test_an_owner_s_own_impossible_number_is_no_cut(self, tmp_path: Path) -> None:
        order = write(tmp_path / "order.log", instance=f"{ORDER} pid 7")
        other = AuditLog(tmp_path / "pay.log", f"{PAYMENT} pid 8")
        other.append({"event": "admission", **said_of(order.chain, 2**52, "ab" * 32)})
        other.close()
        report = verify_audit([tmp_path], evidence_check=signed_by(ORDER))
        assert report.ok, report.problems
        assert "no log is that long" in report.notes[0].sentence

    def test_a_note_that_can_not_be_checked_counts_for_nothing(self, logs: tuple[Path, Path]) -> None:
        def check(evidence: bytes, noted_ms: int) -> SignedNote:
            raise FederationError("no bundle of shop.test", trust_domain="shop.test")

        edit(logs[0], lambda lines: lines[:4])
        report = verify_audit(logs, evidence_check=check)
        assert report.ok, report.problems
        assert "no bundle of shop.test" in report.notes[0].sentence
        assert {summary.witnessed_to for summary in report.chains} == {-1}
        assert any("1 notes of peers were not checked" in line for line in report.cannot_show)

    def test_evidence_that_does_not_verify_or_says_something_else_is_found(
        self, logs: tuple[Path, Path]
    ) -> None:
        def refuse(evidence: bytes, noted_ms: int) -> SignedNote:
            raise SignatureRefusedError("the proof does not cover the head")

        checks: list[EvidenceCheck] = [
            refuse,
            lambda *_: SignedNote(ORDER, None),
            lambda *_: SignedNote(ORDER, ("other", 5, b"x")),
        ]
        for check in checks:
            assert kinds(verify_audit(logs, evidence_check=check)) == {"evidence"}

    def test_a_note_without_evidence_or_malformed_is_found(self, tmp_path: Path) -> None:
        log = AuditLog(tmp_path / "order.log", "o")
        log.append({"event": "decision", "witness": {"chain": "c", "seq": 1, "hash": "00"}})
        log.close()
        assert verify_audit([tmp_path]).ok
        assert kinds(verify_audit([tmp_path], evidence_check=signed_by(ORDER))) == {"evidence"}
        for bad in (
            7,
            None,
            {},
            {"chain": "c", "seq": -1, "hash": "00"},
            {"chain": "c", "seq": 1, "hash": "x"},
        ):
            other = AuditLog(tmp_path / "bad" / "order.log", "o")
            other.append({"event": "decision", "witness": bad})
            other.close()
            assert "malformed" in kinds(verify_audit([other.file])), bad


def rechained(lines: list[bytes], at: int, old: bytes, new: bytes) -> list[bytes]:
    """Change one line as somebody would who owns the file: every later hash is made to fit."""
    assert old in lines[at]
    done = [*lines[:at], lines[at].replace(old, new)]
    for line in lines[at + 1 :]:
        before = json.loads(line)["prev"].encode()
        done.append(line.replace(before, sha256(done[-1]).hexdigest().encode(), 1))
    return done


def test_a_copy_beside_the_original_is_a_fork(tmp_path: Path) -> None:
    log = write(tmp_path / "order.log")
    shutil.copy(log.file, tmp_path / "copy.jsonl")
    edit(tmp_path / "copy.jsonl", lambda lines: lines[:4])
    assert "reordered" in kinds(verify_audit([tmp_path]))


class TestDocumentation:
    PAGE = Path(__file__).parents[3] / "docs" / "audit.md"

    def test_the_pages_example_runs(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code = self.PAGE.read_text().split("```python\n")[1].split("```")[0]
        write(tmp_path / "payment" / "payment.log")
        log = write(tmp_path / "shop" / "order.log")
        edit(log.file, lambda lines: lines[:3] + lines[4:])
        code = code.replace("/var/log/shop", str(tmp_path / "shop"))
        code = code.replace("/mnt/logs-of-payment", str(tmp_path / "payment"))
        exec(compile(code, str(self.PAGE), "exec"), {})
        said = capsys.readouterr().out
        assert f"{log.file.name} 4 record 3 is missing" in said
        assert "nobody else vouches" in said

    def test_the_page_names_every_key_that_the_log_itself_writes(self, tmp_path: Path) -> None:
        page = self.PAGE.read_text()
        write(tmp_path / "order.log", 40, max_file_bytes=2000)
        last = write(tmp_path / "order.log", 1)
        found: set[str] = set()
        for path in tmp_path.glob("*.jsonl"):
            for line in path.read_bytes().splitlines():
                record = json.loads(line)
                if record["event"] in {"start", "rotate", "end"}:
                    found |= {
                        record["event"],
                        *record,
                        *(key for item in record.get("previous", []) for key in item),
                    }
        assert found >= {"start", "rotate", "end", "instance", "previous", "file"}
        assert {key for key in found if f"`{key}`" not in page} == set()
        assert last.file.name.count(
            "."
        ) == "order.20261121T085402Z.60b1838c018229ed2b16366216ea1580.0001.jsonl".count(".")
