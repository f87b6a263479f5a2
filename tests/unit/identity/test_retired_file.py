"""The folder in which authorities are remembered: who is believed, and how several share it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from agentweave_bus.identity import Authority, RetiredAuthorities, RevocationList, RevokedSet, SpiffeID
from agentweave_bus.identity import retired_file as module

pytestmark = pytest.mark.anyio
X = SpiffeID("spiffe://a.test/agent/x")
T0 = 1_800_000_000_000
MINUTE = 60_000


class Process:
    """One of the processes of an identity on a host."""

    def __init__(self, folder, identity=X):
        self.alarms = []
        self.revocations = RevocationList()
        self.history = RetiredAuthorities(
            folder, identity, revocations=self.revocations, on_alarm=self.alarms.append
        )
        self.at_ms = T0

    @property
    def file(self) -> Path:
        (one,) = self.history._folder.path.glob("*.json")
        return one

    async def sees(self, authority, at_ms):
        """A look at the bundle, as of then."""
        self.at_ms = at_ms
        await self.history.load(["a.test"], now_ms=at_ms)
        self.history.note({"a.test": authority.bundle}, now_ms=at_ms)
        await self.history.save(now_ms=at_ms)

    def left(self, fingerprint):
        """When it left, as far as is known here."""
        one = self.history._known["a.test"].get(fingerprint)
        return None if one is None else one.left_at_ms


def fingerprint_of(authority):
    (one,) = authority.bundle.authority_fingerprints
    return one


@pytest.fixture
def old():
    return Authority("a.test")


@pytest.fixture
def new():
    return Authority("a.test")


@pytest.fixture
def start(tmp_path):
    return lambda identity=X: Process(tmp_path / "authorities", identity)


async def test_after_a_crash_it_left_when_it_was_last_written_down(start, old, new):
    first = start()
    await first.sees(old, T0)
    await first.sees(old, T0 + 5 * MINUTE)
    await first.sees(old, T0 + 5 * MINUTE + 10_000)  # too soon for the disk
    second = start()
    await second.sees(new, T0 + 8 * MINUTE)
    assert second.left(fingerprint_of(old)) == T0 + 5 * MINUTE
    third = start()
    await third.sees(new, T0 + 99 * MINUTE)
    assert third.left(fingerprint_of(old)) == T0 + 5 * MINUTE
    assert third.left(fingerprint_of(new)) is None


async def test_one_that_ends_in_order_writes_down_until_when_it_saw_them(start, old, new):
    first = start()
    await first.sees(old, T0)
    await first.history.end(now_ms=T0 + 59_000)
    second = start()
    await second.sees(new, T0 + 90_000)
    assert second.left(fingerprint_of(old)) == T0 + 59_000


async def test_one_that_was_out_of_touch_does_not_say_that_it_saw_them(start, old, new):
    first = start()
    await first.sees(old, T0)
    await first.history.end(now_ms=T0 + 60 * MINUTE)
    second = start()
    await second.sees(new, T0 + 61 * MINUTE)
    assert second.left(fingerprint_of(old)) == T0


async def test_processes_of_an_identity_lose_nothing_of_each_other(start, old, new):
    first, second = start(), start()
    await second.sees(new, T0)  # it never had the other, and nothing was written of it yet
    await first.sees(old, T0 + 1_000)
    await first.sees(new, T0 + 2_000)
    await second.sees(new, T0 + 2 * MINUTE)
    third = start()
    await third.sees(new, T0 + 3 * MINUTE)
    for one in (second, third):
        assert one.left(fingerprint_of(old)) == T0 + 2_000
        assert one.left(fingerprint_of(new)) is None


async def test_a_process_to_which_the_news_comes_late_does_not_bring_it_back(start, old, new):
    late, first = start(), start()
    await late.sees(old, T0)
    await first.sees(old, T0)
    await first.sees(new, T0 + MINUTE)
    await late.sees(old, T0 + 3 * MINUTE)
    fresh = start()
    await fresh.sees(new, T0 + 4 * MINUTE)
    assert fresh.left(fingerprint_of(old)) == T0 + MINUTE


async def test_one_that_came_back_is_in_the_bundle_for_all(start, old, new):
    first = start()
    await first.sees(old, T0)
    await first.sees(new, T0 + MINUTE)
    await first.sees(old, T0 + 2 * MINUTE)
    await first.sees(old, T0 + 5 * MINUTE)
    fresh = start()
    await fresh.sees(new, T0 + 6 * MINUTE)
    assert fresh.left(fingerprint_of(old)) == T0 + 5 * MINUTE


async def test_revoked_ones_are_taken_out_of_the_file(start, old, new):
    first = start()
    await first.sees(old, T0)
    await first.sees(new, T0 + MINUTE)
    first.revocations.replace(RevokedSet(authorities=frozenset({fingerprint_of(old)})))
    first.history.drop_revoked()
    await first.history.save(now_ms=T0 + MINUTE)
    fresh = start()
    await fresh.sees(new, T0 + 2 * MINUTE)
    assert fresh.left(fingerprint_of(old)) is None
    assert fingerprint_of(old) not in fresh.history._known["a.test"]


async def test_identities_have_folders_of_their_own(start, old, new):
    await start().sees(old, T0)
    other = start(SpiffeID("spiffe://a.test/agent/x-"))
    await other.sees(new, T0 + MINUTE)
    assert fingerprint_of(old) not in other.history._known["a.test"]


async def test_only_the_user_can_read_it(start, old):
    first = start()
    await first.sees(old, T0)
    assert first.file.stat().st_mode & 0o777 == 0o600
    assert first.file.parent.stat().st_mode & 0o777 == 0o700


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])


def empty(file):
    file.write_bytes(b"")


def not_json(file):
    file.write_bytes(b"\xff\x00")


def with_more(file):
    file.write_text(file.read_text().replace('"v": 1', '"v": 1, "w": 2'))


def of_texts(file):
    file.write_text(file.read_text().replace('"v": 1', '"v": "1"'))


def of_another_domain(file):
    file.write_text(file.read_text().replace('"a.test"', '"b.test"'))


def of_another_identity(file):
    file.write_text(file.read_text().replace("agent/x", "agent/y"))


def of_no_certificates(file):
    file.write_text(file.read_text().replace('"certificate": "MII', '"certificate": "AAA'))


def too_large(file):
    file.write_text(file.read_text() + " " * module._MAX_FILE_BYTES)


def readable_by_others(file):
    file.chmod(0o640)


def writable_by_others(file):
    file.chmod(0o602)


def a_link(file):
    real = file.with_name("real")
    file.rename(real)
    file.symlink_to(real)


def a_hard_link(file):
    os.link(file, file.with_name("second"))


def a_pipe(file):
    file.unlink()
    os.mkfifo(file, 0o600)


@pytest.mark.parametrize(
    "spoil",
    [
        cut,
        empty,
        not_json,
        with_more,
        of_texts,
        of_another_domain,
        of_another_identity,
        of_no_certificates,
        too_large,
        readable_by_others,
        writable_by_others,
        a_link,
        a_hard_link,
        a_pipe,
    ],
)
async def test_a_file_that_is_not_believed_is_put_aside_with_an_alarm_and_stops_nobody(
    start, old, new, spoil
):
    first = start()
    await first.sees(old, T0)
    await first.sees(new, T0 + MINUTE)
    spoil(first.file)
    second = start()
    await second.sees(new, T0 + 2 * MINUTE)
    assert fingerprint_of(old) not in second.history._known["a.test"]
    (alarm,) = second.alarms
    assert "put aside" in alarm
    assert list(second.file.parent.glob("*.refused"))
    third = start()
    await third.sees(old, T0 + 3 * MINUTE)
    assert third.left(fingerprint_of(new)) == T0 + 2 * MINUTE
    assert third.alarms == []


async def test_a_folder_that_others_can_write_is_neither_read_nor_written(start, old, new):
    first = start()
    await first.sees(old, T0)
    folder, before = first.file.parent, first.file.read_bytes()
    folder.chmod(0o770)
    second = start()
    await second.sees(new, T0 + MINUTE)
    assert fingerprint_of(old) not in second.history._known["a.test"]
    assert "nobody else may write it" in second.alarms[0]
    assert len(second.alarms) == 1
    assert second.file.read_bytes() == before
    await second.sees(old, T0 + 2 * MINUTE)
    assert second.left(fingerprint_of(new)) == T0 + 2 * MINUTE  # while it runs, it remembers all the same


@pytest.mark.parametrize("which", ["folder", "file"])
async def test_what_belongs_to_another_user_is_not_believed(start, old, new, monkeypatch, which):
    first = start()
    await first.sees(old, T0)
    folder, me = first.file.parent, os.geteuid()
    foreign = (folder if which == "folder" else first.file).stat().st_ino
    real = os.fstat

    class Foreign:
        def __init__(self, found):
            self._found = found

        def __getattr__(self, name):
            value = getattr(self._found, name)
            return me + 1 if name == "st_uid" and self._found.st_ino == foreign else value

    monkeypatch.setattr(module.os, "fstat", lambda descriptor: Foreign(real(descriptor)))
    second = start()
    await second.history.load(["a.test"], now_ms=T0 + 1)
    assert second.history._known["a.test"] == {}
    assert len(second.alarms) == 1


async def test_a_lock_that_somebody_keeps_costs_an_alarm_and_is_tried_again(start, old, monkeypatch):
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.05)
    first = start()
    await first.sees(old, T0)
    descriptor = os.open(first.file.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        await first.sees(old, T0 + 2 * MINUTE)
        assert len(first.alarms) == 1
        second = start()
        await second.history.load(["a.test"], now_ms=T0)
        assert second.alarms
    finally:
        os.close(descriptor)
    await second.history.load(["a.test"], now_ms=T0)
    assert second.left(fingerprint_of(old)) is not None


async def test_where_nothing_can_be_written_an_agent_goes_on(tmp_path, old, new):
    (tmp_path / "file").write_text("")
    one = Process(tmp_path / "file")
    await one.sees(old, T0)
    await one.sees(new, T0 + MINUTE)
    assert one.left(fingerprint_of(old)) == T0 + MINUTE
    assert len(one.alarms) == 1
