"""Checking audit logs: finds any change, gap, cut, swap or replacement, and says what it can't show.

A chain is checked against itself (numbers and hashes run on), against later chains of the same log
(which name where it ended) and against what peers noted in *their* logs while it grew. Only the last
kind holds against somebody who owns the machine, and only as far as it reaches; the report says how far.

Reads files and verifies no signatures: a peer's note carries the signed head, and whether that is
genuine is asked of the ``evidence_check`` passed in (the envelope part knows how).
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from agentweave_bus.authz.audit_findings import AuditReport, ChainSummary, Finding
from agentweave_bus.authz.audit_format import FIRST_PREV, line_hash
from agentweave_bus.authz.audit_frames import check_frames
from agentweave_bus.exceptions import AgentWeaveError, AuditError, BundleUnavailableError, FederationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from agentweave_bus.authz.audit_frames import FrameCheck

__all__ = ["EvidenceCheck", "SignedNote", "verify_audit"]

MAX_LINE_BYTES: Final = 16 * 1024 * 1024
MAX_SEQ: Final = 2**40
MAX_JUMP: Final = 1_000_000
"""Records missing in one place that are still counted as a gap; a larger jump is damage."""
HASH_BYTES: Final = 32
PAGE: Final = 16
"""Hashes kept together. Were there more, a small log full of gaps could take much memory."""


class SignedNote(NamedTuple):
    """What a signed head says of a log.

    Attributes:
        signer: the SPIFFE ID of whoever signed it, verified.
        log: chain, sequence number and hash; None where it says nothing. A head may name any chain.

    """

    signer: str
    log: tuple[str, int, bytes] | None


EvidenceCheck: TypeAlias = Callable[[bytes, int], SignedNote]
"""Verifies what carried a peer's note and returns who signed it, and what it says of the signer's log.

It gets the bytes that the record keeps (msgpack of head, proof and chain, as ``via`` links are written)
and the milliseconds since the epoch at which they were noted. It raises ``FederationError`` or
``BundleUnavailableError`` where it can't tell, for want of a bundle, and any other ``AgentWeaveError``
where the bytes prove nothing."""


def verify_audit(
    paths: Iterable[str | Path],
    *,
    evidence_check: EvidenceCheck | None = None,
    frame_check: FrameCheck | None = None,
) -> AuditReport:
    """Check the logs in ``paths``: files, or directories whose ``*.jsonl`` (and ``*.frames``) are meant.

    Give the logs of peers, too: what they noted about each other is what shows a cut or a replacement.
    ``evidence_check`` verifies the signatures under those notes, ``frame_check`` kept frames (the envelope
    part knows how).

    Raises:
        AuditError: a file can't be read, or a directory holds no log: that is no clean bill.

    """
    checker = _Checker(evidence_check)
    given = [Path(path) for path in paths]
    try:
        for path in _in_order(given):
            checker.read(path)
        checker.read_frames([one for path in given for one in sorted(path.glob("*.frames"))], frame_check)
    except OSError as problem:
        raise AuditError(f"{problem.filename} can't be read: {problem.strerror}") from problem
    return checker.report()


def _in_order(paths: Iterable[Path]) -> list[Path]:
    """Return the files, each chain's in the order of their first records, whatever they are called."""
    files = {file.resolve(): file for path in paths for file in _files_of(path)}
    return sorted(files.values(), key=_first_record)


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.jsonl"))
    if not found:
        raise AuditError(f"{path} holds no audit log (*.jsonl)")
    return found


def _first_record(path: Path) -> tuple[str, int, str]:
    with path.open("rb") as file:
        record = _parsed(file.readline(MAX_LINE_BYTES))
    return ("", 0, path.name) if record is None else (record.chain, record.seq, path.name)


class _Record(NamedTuple):
    chain: str
    seq: int
    ts: int
    prev: bytes
    body: dict[str, Any]


def _parsed(line: bytes) -> _Record | None:
    try:
        body = json.loads(line)
        chain, _, number = body["audit_id"].rpartition("-")
        record = _Record(chain, body["seq"], body["ts"], bytes.fromhex(body["prev"]), body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    sound = type(record.seq) is int and type(record.ts) is int and number == str(record.seq)
    return record if sound and 0 <= record.seq < MAX_SEQ else None


class _Place(NamedTuple):
    file: str
    line: int


class _Claim(NamedTuple):
    """A record's word about where another chain was."""

    chain: str
    seq: int
    hash: bytes
    observer: str
    by_peer: bool
    signer: str
    """Who signed it, verified; empty for a record's own word."""
    torn: int
    place: _Place


@dataclass(slots=True)
class _Chain:
    first_seq: int
    pages: dict[int, bytearray] = field(default_factory=dict)
    """The hashes, of ``PAGE`` numbers that follow one another each: a gap in the numbers takes no memory."""
    instance: str = ""
    next_seq: int = 0
    last_hash: bytes = FIRST_PREV
    last_event: str = ""
    records: int = 0
    torn: tuple[_Place, int] | None = None
    named_to: int = -1
    witnessed_to: int = -1

    @property
    def owner(self) -> str:
        """The SPIFFE ID in the start record, which reads "<SPIFFE ID> pid N"."""
        return self.instance.partition(" ")[0]

    def hash_at(self, seq: int) -> bytes | None:
        page = self.pages.get(seq // PAGE)
        at = seq % PAGE * HASH_BYTES
        found = FIRST_PREV if page is None else bytes(page[at : at + HASH_BYTES])
        return None if found == FIRST_PREV else found

    def put(self, seq: int, digest: bytes) -> None:
        if seq < self.first_seq:
            return
        page = self.pages.get(seq // PAGE)
        if page is None:
            page = self.pages[seq // PAGE] = bytearray(PAGE * HASH_BYTES)
        at = seq % PAGE * HASH_BYTES
        page[at : at + HASH_BYTES] = digest


class _Checker:
    """Reads files one after the other, then compares what they say of each other."""

    def __init__(self, evidence_check: EvidenceCheck | None) -> None:
        self._evidence_check = evidence_check
        self._problems: list[Finding] = []
        self._notes: list[Finding] = []
        self._chains: dict[str, _Chain] = {}
        self._claims: dict[tuple[str, int, bytes, bool, str], _Claim] = {}
        self._unchecked = 0
        self._of_frames: list[str] = []

    # --- one file --------------------------------------------------------------------------------------

    def read(self, path: Path) -> None:
        chain: _Chain | None = None
        for number, line in _lines(path):
            place = _Place(path.name, number)
            if not line.endswith(b"\n"):
                self._torn(chain, place, len(line))
                return
            chain = self._read_line(chain, line[:-1], place)
        if chain is None:
            self._problem("cut", _Place(path.name, 0), "the file holds no record: emptied, or a crash")

    def _read_line(self, chain: _Chain | None, line: bytes, place: _Place) -> _Chain | None:
        record, digest = _parsed(line), line_hash(line)
        if record is not None and chain is not None and record.seq > chain.next_seq + MAX_JUMP:
            record = None
        if record is None:
            self._problem("malformed", place, "this line is no audit record: it was changed or damaged")
            if chain is not None:
                chain.put(chain.next_seq, digest)
                chain.next_seq, chain.last_hash = chain.next_seq + 1, digest
            return chain
        known = self._chain_of(record, place)
        if chain is not None and chain is not known:
            self._problem("reordered", place, "this record belongs to another chain than its file")
        self._follow(known, record, place)
        known.put(record.seq, digest)
        known.next_seq, known.last_hash = record.seq + 1, digest
        known.records, known.last_event = known.records + 1, str(record.body.get("event", ""))
        self._look_inside(known, record, place)
        return known

    def _chain_of(self, record: _Record, place: _Place) -> _Chain:
        known = self._chains.get(record.chain)
        if known is None:
            known = self._chains[record.chain] = _Chain(record.seq)
            if record.seq > 0:
                known.next_seq, known.last_hash = record.seq, record.prev
                sentence = (
                    f"records 0 to {record.seq - 1} of this chain, and the files with them, are missing"
                )
                self._problem("missing", place, sentence)
        return known

    def _follow(self, chain: _Chain, record: _Record, place: _Place) -> None:
        expected = chain.next_seq
        if record.seq > expected:
            gone = str(expected) if record.seq == expected + 1 else f"{expected} to {record.seq - 1}"
            self._problem("gap", place, f"record {gone} is missing before this one")
        elif record.seq < expected:
            self._problem("reordered", place, f"record {record.seq} stands where {expected} belongs")
        elif chain.last_event == "end":
            self._problem("changed", place, "this record follows the chain's closing record")
        elif (record.seq == 0) != (record.body.get("event") == "start"):
            self._problem("changed", place, "a chain begins with its start record, and has only one")
        elif record.prev != chain.last_hash:
            sentence = f"record {record.seq} was not written after the line that stands before it: "
            self._problem("changed", place, sentence + "one of the two was changed")

    def _torn(self, chain: _Chain | None, place: _Place, length: int) -> None:
        if chain is None:
            self._problem("cut", place, "the file's only record is torn")
        else:
            chain.torn = (place, length)

    def read_frames(self, segments: list[Path], check: FrameCheck | None) -> None:
        if not segments:
            return
        self._of_frames.append("a kept frame that is gone may have been removed, or its time was up")
        if check is None:
            self._of_frames.append("kept frames were not checked: no trust bundle was given")
            return
        faults, unchecked = check_frames(segments, check)
        self._problems += faults
        if unchecked:
            self._of_frames.append(f"{unchecked} kept frames were not checked: a trust bundle was not given")

    # --- what records say --------------------------------------------------------------------------------

    def _look_inside(self, chain: _Chain, record: _Record, place: _Place) -> None:
        body = record.body
        if body.get("event") == "start":
            if record.seq == 0:
                chain.instance = str(body.get("instance", ""))
            for earlier in _dicts(body.get("previous")):
                self._claim(earlier, record, place, by_peer=False)
        if "witness" in body:
            self._peer(body["witness"], record, place)

    def _peer(self, witness: Any, record: _Record, place: _Place) -> None:
        if self._evidence_check is None or _witness_of(witness) is None:
            self._claim(witness, record, place, by_peer=True)
        elif (signer := self._signer(self._evidence_check, witness, record, place)) is not None:
            self._claim(witness, record, place, by_peer=True, signer=signer)

    def _signer(
        self, check: EvidenceCheck, witness: dict[str, Any], record: _Record, place: _Place
    ) -> str | None:
        """Return who signed what ``witness`` says; None, after telling why, where nobody is known to have."""
        try:
            said = check(b64decode(witness["evidence"], validate=True), record.ts)
        except (FederationError, BundleUnavailableError) as problem:
            self._unchecked += 1
            self._note("evidence", place, f"this note was not checked and counts for nothing: {problem}")
            return None
        except AgentWeaveError as problem:
            self._problem("evidence", place, f"the evidence does not verify: {problem}")
            return None
        except (ValueError, KeyError, TypeError):
            self._problem("evidence", place, "what carried this note is missing or malformed")
            return None
        if said.log is None or tuple(said.log) != _witness_of(witness):
            self._problem("evidence", place, "the witness noted is not what the signed head says")
            return None
        return said.signer

    def _claim(self, said: Any, record: _Record, place: _Place, *, by_peer: bool, signer: str = "") -> None:
        noted = _witness_of(said)
        if noted is None:
            self._problem("malformed", place, "what this record says of another chain is malformed")
            return
        torn = said.get("torn", 0)
        claim = _Claim(*noted, record.chain, by_peer, signer, torn if type(torn) is int else 0, place)
        self._claims.setdefault((*noted, by_peer, signer), claim)

    # --- all together ------------------------------------------------------------------------------------

    def report(self) -> AuditReport:
        for claim in self._claims.values():
            self._compare(claim)
        for chain in self._chains.values():
            self._check_end(chain)
        return AuditReport(
            problems=tuple(self._problems),
            notes=tuple(self._notes),
            cannot_show=tuple(self._limits()),
            chains=tuple(self._summary(name, chain) for name, chain in self._chains.items()),
        )

    def _compare(self, claim: _Claim) -> None:
        chain = self._chains.get(claim.chain)
        if chain is None:
            if not claim.by_peer:
                sentence = f"chain {claim.chain} stood beside this one when it began, and is not here"
                self._problem("missing", claim.place, sentence)
            return
        if claim.signer and claim.signer != chain.owner:
            sentence = f"{claim.signer} spoke of chain {claim.chain}, whose start record names another: "
            self._note("evidence", claim.place, sentence + f"{chain.owner!r}. Its word counts for nothing")
            return
        found = chain.hash_at(claim.seq)
        # Without a verified signature this is somebody's word against the chain: worth a look, no proof.
        report = self._note if claim.by_peer and not claim.signer else self._problem
        if claim.by_peer and claim.seq >= MAX_SEQ:
            sentence = f"{_who(claim)} saw record {claim.seq} of chain {claim.chain}: no log is that long"
            self._note("evidence", claim.place, sentence)
        elif claim.seq >= chain.next_seq:
            sentence = f"chain {claim.chain} ends at record {chain.next_seq - 1}, but {_who(claim)} saw "
            report("cut", claim.place, sentence + f"{claim.seq}: the end was cut off")
        elif found is not None and found != claim.hash:
            sentence = f"record {claim.seq} of chain {claim.chain} is not the one that {_who(claim)} saw"
            report("changed", claim.place, sentence + ": it, or something before it, was replaced")
        elif found is not None and claim.observer != claim.chain:
            self._vouched(chain, claim)

    def _vouched(self, chain: _Chain, claim: _Claim) -> None:
        if claim.by_peer:
            chain.witnessed_to = max(chain.witnessed_to, claim.seq)
            return
        chain.named_to = max(chain.named_to, claim.seq)
        if chain.torn and (claim.torn, claim.seq) == (chain.torn[1], chain.next_seq - 1):
            sentence = "the file ends in the middle of a record, as it did when the next chain began"
            self._note("cut", chain.torn[0], sentence)
            chain.torn = None

    def _check_end(self, chain: _Chain) -> None:
        if chain.torn:
            sentence = "the file ends in the middle of a record: the process died, or it was cut here"
            self._problem("cut", chain.torn[0], sentence)

    def _limits(self) -> Iterator[str]:
        for name, chain in self._chains.items():
            last, vouched = chain.next_seq - 1, max(chain.witnessed_to, chain.named_to)
            if vouched < 0:
                yield f"chain {name}: nobody else vouches for it; all of it could have been written anew"
            elif vouched < last:
                yield (
                    f"chain {name}: after record {vouched} nobody else vouches for it; "
                    "later records could have been cut off or replaced"
                )
            if chain.named_to > chain.witnessed_to:
                since = f"after record {chain.witnessed_to} " if chain.witnessed_to >= 0 else ""
                yield (
                    f"chain {name}: {since}only a later chain of the same log vouches for it; "
                    "whoever can write the directory could have replaced both"
                )
        absent = {
            claim.chain: claim.signer for claim in self._claims.values() if claim.chain not in self._chains
        }
        for signer, count in Counter(absent.values()).items():
            chains, are, were = ("chain", "is", "was") if count == 1 else ("chains", "are", "were")
            whose = f"{count} {chains} of {signer}" if signer else f"{count} other {chains}"
            yield f"{whose} that {are} mentioned here {were} not given: kept elsewhere, removed or replaced"
        yield from self._of_frames
        if self._evidence_check is None:
            yield (
                "signatures under what peers noted were not checked: a peer's log could be lying, "
                "so that nothing is called cut or replaced on its word"
            )
        if self._unchecked:
            yield f"{self._unchecked} notes of peers were not checked: a trust bundle was not given"
        yield "an action that was never recorded leaves no trace here; times are the writers' own clocks"

    def _summary(self, name: str, chain: _Chain) -> ChainSummary:
        return ChainSummary(
            chain=name,
            instance=chain.instance,
            records=chain.records,
            first_seq=chain.first_seq,
            last_seq=chain.next_seq - 1,
            ended=chain.last_event == "end",
            named_to=chain.named_to,
            witnessed_to=chain.witnessed_to,
        )

    def _problem(self, kind: str, place: _Place, sentence: str) -> None:
        self._problems.append(Finding(kind, place.file, place.line, sentence))

    def _note(self, kind: str, place: _Place, sentence: str) -> None:
        self._notes.append(Finding(kind, place.file, place.line, sentence))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            yield number, line


def _dicts(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _witness_of(value: object) -> tuple[str, int, bytes] | None:
    if not isinstance(value, dict):
        return None
    chain, seq, digest = value.get("chain"), value.get("seq"), value.get("hash")
    if not (isinstance(chain, str) and type(seq) is int and seq >= 0 and isinstance(digest, str)):
        return None
    try:
        return chain, seq, bytes.fromhex(digest)
    except ValueError:
        return None


def _who(claim: _Claim) -> str:
    if not claim.by_peer:
        return "the next chain of its log"
    return "a peer (proved by a signature)" if claim.signer else "a peer (by its log's word)"
