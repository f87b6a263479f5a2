"""``audit verify`` with real signatures: whose word about a chain counts, and for how long."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agentweave_bus.authz import AuditLog
from agentweave_bus.envelope import (
    JSON_CONTENT_TYPE,
    Draft,
    Kind,
    Sealer,
    encode_link,
    encode_payload,
    new_id,
)
from agentweave_bus.identity import Authority
from agentweave_bus.spiffe_id import SpiffeID

ORDER, PAYMENT, STRANGER = (SpiffeID(f"spiffe://shop.test/agent/{name}") for name in ("order", "pay", "x"))
MINUTE = 60_000


class Logs:
    """Order's log, whole, and what payment noted about it under somebody's signature."""

    def __init__(self, place: Path) -> None:
        self.authority = Authority("shop.test", not_before=datetime.now(UTC) - timedelta(hours=1))
        self.bundle = place / "bundle.pem"
        self.bundle.write_bytes(self.authority.bundle.to_pem())
        self.folder = place / "logs"
        log = AuditLog(self.folder / "order.log", f"{ORDER} pid 7")
        log.append({"event": "call"})
        log.close()
        self.chain = log.chain

    def note(
        self, signer: SpiffeID, *, ago_ms: int = 0, kind: Kind = Kind.CALL, lifetime_ms: int = 30_000
    ) -> None:
        svid = self.authority.issue(signer, not_before=datetime.now(UTC) - timedelta(minutes=10))
        iat, said = int(time.time() * 1000) - ago_ms, (self.chain, 400, b"\xab" * 32)
        draft = Draft(
            kind=kind, id=new_id(iat), aud=PAYMENT, cap="pay", sub="s", iat=iat, exp=iat + lifetime_ms,
            ct=JSON_CONTENT_TYPE, reply="A" * 22 if kind is Kind.CALL else None, log=said,
        )  # fmt: skip
        sealed = Sealer(lambda: svid).seal_now(draft, encode_payload({}))
        evidence = base64.b64encode(encode_link(sealed.link)).decode()
        log = AuditLog(self.folder / "pay.log", f"{PAYMENT} pid 8")
        witness = {"chain": said[0], "seq": said[1], "hash": said[2].hex(), "evidence": evidence}
        log.append({"event": "admission", "witness": witness})
        log.close()


@pytest.fixture
def logs(place: Path) -> Logs:
    return Logs(place)


def verify(run: Callable, logs: Logs) -> dict:
    return run("audit", "verify", str(logs.folder), "--bundle", f"shop.test={logs.bundle}").json


def test_what_the_owner_signed_shows_the_cut(run: Callable, logs: Logs) -> None:
    logs.note(ORDER)
    assert [problem["kind"] for problem in verify(run, logs)["problems"]] == ["cut"]


def test_what_a_stranger_signed_alarms_nobody_and_names_the_stranger(run: Callable, logs: Logs) -> None:
    logs.note(STRANGER)
    report = verify(run, logs)
    assert report["ok"], report["problems"]
    assert [note["sentence"].split()[0] for note in report["notes"]] == [STRANGER]


@pytest.mark.parametrize(
    ("kind", "lifetime_ms", "found"),
    [(Kind.CALL, 5 * MINUTE, "evidence"), (Kind.TASK, 30_000, "evidence"), (Kind.TASK, 5 * MINUTE, "cut")],
)
def test_a_note_must_have_been_written_while_the_message_could_arrive(
    run: Callable, logs: Logs, kind: Kind, lifetime_ms: int, found: str
) -> None:
    """A task waits in its stream until it expires; a call arrives at once."""
    logs.note(ORDER, ago_ms=2 * MINUTE, kind=kind, lifetime_ms=lifetime_ms)
    assert [problem["kind"] for problem in verify(run, logs)["problems"]] == [found]
