"""The file of revocations: strict, followed while it changes, and changed without a moment of half a file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest

from agentweave_bus.exceptions import ChainRefusedError, ConfigurationError
from agentweave_bus.identity import Authority, ChainVerifier, RevocationWatch, RevokedSet, revocation_file
from agentweave_bus.identity.revocation_file import (
    RevokedEntry,
    add_revocation,
    load_revocations,
    remove_revocations,
)
from agentweave_bus.spiffe_id import SpiffeID

ORDER = SpiffeID("spiffe://shop.test/agent/order")
HEX = "ab" * 32
NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)
TAIL = "reason: x, time: 2026-01-31T12:00:00Z"
GOOD = f"""
revoked:
  - {{spiffe_id: {ORDER}, reason: left the company, time: 2026-01-31T12:00:00Z}}
  - {{spiffe_id: spiffe://shop.test/agent/stock, issued_before: 2026-01-31T12:00:00+01:00,
      reason: disk stolen, time: 2026-01-31T12:00:00Z}}
  - {{fingerprint: "{":".join(["AB"] * 32)}", reason: key in a log, time: 2026-01-31T12:00:00Z}}
  - {{authority: "{HEX}", reason: intermediate lost, time: "2026-01-31T12:00:00Z"}}
"""


def written(folder: Path, text: str = GOOD) -> Path:
    path = folder / "revoked.yaml"
    draft = folder / "draft"
    draft.write_text(text)
    draft.replace(path)
    return path


def entry(**given: object) -> RevokedEntry:
    return RevokedEntry.model_validate({"reason": "a test", "time": NOW, **given})


def test_each_kind_of_entry_is_read(tmp_path: Path) -> None:
    revoked = load_revocations(written(tmp_path)).to_set()
    assert revoked.spiffe_ids == {ORDER}
    assert revoked.certificates == revoked.authorities == {bytes.fromhex(HEX)}
    eleven = int(datetime(2026, 1, 31, 11, tzinfo=UTC).timestamp() * 1000)
    assert revoked.issued_before == {"spiffe://shop.test/agent/stock": eleven}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'revoked' is missing"),
        ("revoked:", "must be a list"),
        ("revoked: []\nrevokd: []", "Did you mean 'revoked'?"),
        (f"revoked: [{{spiffe_id: {ORDER}, time: 2026-01-31T12:00:00Z}}]", "reason' is missing"),
        (f"revoked: [{{spiffe_id: {ORDER}, reason: x}}]", "time' is missing"),
        (f"revoked: [{{spiffe_id: {ORDER}, reason: x, time: 2026-01-31}}]", "with its zone"),
        (f"revoked: [{{spiffe_id: {ORDER}, reason: x, time: 2026-01-31 12:00:00}}]", "timezone"),
        (f"revoked: [{{spiffe_id: {ORDER}, reason: x, time: 17}}]", "with its zone"),
        ("revoked: [{reason: x, time: 2026-01-31T12:00:00Z}]", "name one of"),
        (
            f"revoked: [{{spiffe_id: {ORDER}, fingerprint: {HEX}, reason: x, time: 2026-01-31T12:00:00Z}}]",
            "name one of",
        ),
        (f"revoked: [{{fingerprint: {HEX}, issued_before: 2026-01-31T12:00:00Z, {TAIL}}}]", "goes with"),
        ("revoked: [{fingerprint: abcd, reason: x, time: 2026-01-31T12:00:00Z}]", "64 hexadecimal"),
        (
            "revoked: [{spiffe_id: 'spiffe://shop.test', reason: x, time: 2026-01-31T12:00:00Z}]",
            "whole trust",
        ),
        ("revoked: [{spiffe_id: shop, reason: x, time: 2026-01-31T12:00:00Z}]", "spiffe://"),
    ],
)
def test_a_mistake_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, "# a comment\n" + text)
    with pytest.raises(ConfigurationError, match=r"revoked\.yaml") as refused:
        load_revocations(path)
    assert said in str(refused.value)


def test_a_file_that_is_not_there_keeps_the_process_from_starting(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="can't be read: No such file"):
        RevocationWatch(tmp_path / "revoked.yaml")


def test_without_a_file_nothing_is_revoked() -> None:
    watch = RevocationWatch(None)
    assert watch.refresh() is False
    assert watch.list.reason_against(ORDER, b"", ()) is None


def test_a_bad_or_missing_file_leaves_what_was_revoked_and_alarms_once(tmp_path: Path) -> None:
    alarms: list[str] = []
    path = written(tmp_path)
    watch = RevocationWatch(path, on_alarm=alarms.append)
    in_force = watch.list.revoked
    written(tmp_path, "revoked: [nonsense]")
    assert (watch.refresh(), watch.refresh()) == (False, False)
    path.unlink()
    assert (watch.refresh(), watch.refresh()) == (False, False)
    assert watch.list.revoked == in_force
    assert ["stay as they were" in one for one in alarms] == [True, True]
    written(tmp_path, "revoked: []")
    assert watch.refresh() is True
    assert watch.list.reason_against(ORDER, b"", ()) is None


@pytest.mark.parametrize(
    "slip",
    ["!!timestamp soon", "!!bool maybe", "!!int ''", "0x" + "f" * 100_000, "2026-02-30"],
    ids=["no time", "no yes or no", "no number", "a long number", "no day"],
)
def test_a_slip_of_any_kind_is_an_alarm(tmp_path: Path, slip: str) -> None:
    alarms: list[str] = []
    watch = RevocationWatch(written(tmp_path), on_alarm=alarms.append)
    in_force = watch.list.revoked
    written(tmp_path, f"revoked: {slip}")
    assert (watch.refresh(), watch.refresh()) == (False, False)
    assert watch.list.revoked == in_force
    assert ["revoked.yaml:1: " in one for one in alarms] == [True]


def test_a_fault_that_nobody_foresaw_leaves_what_was_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_path: Path) -> None:
        raise KeyError("a secret of the file")

    alarms: list[str] = []
    watch = RevocationWatch(written(tmp_path), on_alarm=alarms.append)
    in_force = watch.list.revoked
    monkeypatch.setattr(revocation_file, "load_revocations", fails)
    written(tmp_path, "revoked: []")
    assert (watch.refresh(), watch.refresh()) == (False, False)
    assert watch.list.revoked == in_force
    assert alarms == ["the revocations stay as they were: KeyError"]
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [KeyError]


@pytest.mark.anyio
async def test_a_change_is_followed_and_told(tmp_path: Path) -> None:
    path = written(tmp_path, "revoked: []")
    watch = RevocationWatch(path)
    told = anyio.Event()
    watch.on_change(told.set)
    async with anyio.create_task_group() as group:
        group.start_soon(watch.run)
        written(tmp_path)
        with anyio.fail_after(30):
            await told.wait()
        assert watch.list.reason_against(ORDER, b"", ()) == "its identity is revoked"
        group.cancel_scope.cancel()


def test_certificates_issued_before_are_refused_and_later_ones_accepted() -> None:
    """By the leaf's own beginning: that of the path may be later, and who sends a chain chooses the path."""
    revoked_at = datetime.now(UTC).replace(microsecond=0)
    authority = Authority("shop.test", not_before=revoked_at)
    old = authority.issue(ORDER, not_before=revoked_at - timedelta(seconds=1))
    new = authority.issue(ORDER, not_before=revoked_at)

    class Bundles:
        def bundle_for(self, _domain: str) -> object:
            return authority.bundle

    chains = ChainVerifier(Bundles())  # type: ignore[arg-type]
    at_ms = int(revoked_at.timestamp() * 1000) + 500
    for svid in (old, new):
        assert chains.verify(svid.cert_chain, at_ms=at_ms).not_before_ms == at_ms - 500
    chains.revocations.replace(RevokedSet(issued_before={ORDER: int(revoked_at.timestamp() * 1000)}))
    with pytest.raises(ChainRefusedError, match="issued to it as early as this one are revoked"):
        chains.verify(old.cert_chain, at_ms=at_ms)
    assert chains.verify(new.cert_chain, at_ms=at_ms).spiffe_id == ORDER


class TestChanging:
    def test_the_first_entry_makes_the_file_and_others_join_it(self, tmp_path: Path) -> None:
        path = tmp_path / "revoked.yaml"
        assert add_revocation(path, entry(spiffe_id=ORDER)) is True
        assert add_revocation(path, entry(fingerprint=HEX)) is True
        assert load_revocations(path).revoked == (entry(spiffe_id=ORDER), entry(fingerprint=HEX))
        assert [one.name for one in tmp_path.iterdir()] == ["revoked.yaml"]

    def test_what_stands_already_is_not_said_twice_and_what_goes_further_replaces(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "revoked.yaml"
        earlier, later = (
            entry(spiffe_id=ORDER, issued_before=NOW),
            entry(spiffe_id=ORDER, issued_before=NOW + timedelta(days=1)),
        )
        assert [add_revocation(path, one) for one in (later, earlier, later)] == [True, False, False]
        assert add_revocation(path, entry(spiffe_id=ORDER)) is True
        assert load_revocations(path).revoked == (entry(spiffe_id=ORDER),)
        assert add_revocation(path, later) is False

    def test_an_entry_can_be_taken_out_again(self, tmp_path: Path) -> None:
        path = tmp_path / "revoked.yaml"
        add_revocation(path, entry(spiffe_id=ORDER))
        assert remove_revocations(path, entry(spiffe_id=ORDER).subject) is True
        assert remove_revocations(path, entry(spiffe_id=ORDER).subject) is False
        assert load_revocations(path).revoked == ()

    def test_a_file_with_a_mistake_is_left_alone(self, tmp_path: Path) -> None:
        path = written(tmp_path, "revoked: [nonsense]")
        with pytest.raises(ConfigurationError, match=r"revoked\[0\]"):
            add_revocation(path, entry(spiffe_id=ORDER))
        assert path.read_text() == "revoked: [nonsense]"

    def test_mode_and_link_are_kept(self, tmp_path: Path) -> None:
        real = written(tmp_path, "revoked: []")
        real.chmod(0o640)
        link = tmp_path / "link.yaml"
        link.symlink_to(real)
        add_revocation(link, entry(spiffe_id=ORDER))
        assert link.is_symlink()
        assert real.stat().st_mode & 0o777 == 0o640

    def test_a_directory_that_is_not_there_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="can't be written: No such file"):
            add_revocation(tmp_path / "no" / "revoked.yaml", entry(spiffe_id=ORDER))

    def test_who_add_at_the_same_time_lose_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "revoked.yaml"

        def add(mark: str) -> None:
            for number in range(10):
                add_revocation(path, entry(fingerprint=f"{mark}{number:063x}"))

        with ThreadPoolExecutor() as pool:
            list(pool.map(add, "12"))
        assert len(load_revocations(path).revoked) == 20
