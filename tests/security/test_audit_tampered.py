"""Attack: somebody who can edit files changes what an audit log says of the past."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from agentweave_bus import AgentWeaveClient
from agentweave_bus.authz import AuditLog
from agentweave_bus.authz.frames import frames_in
from agentweave_bus.cli import main
from tests.integration.connections import until
from tests.integration.probes import CLI, DOMAIN, ECHO, Held, data_of
from tests.security.catalogue import Adversary, Layer, refused_by

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def genuine(session_world, tmp_path_factory):
    """Logs of a callee and of a caller that was restarted once, with what the callee noted of the caller's."""
    world, folder = session_world, tmp_path_factory.mktemp("genuine")

    def audit(name):
        return {"authorization__audit": {"destination": str(folder / "logs" / f"{name}.jsonl")}}

    echo = await world.agent(ECHO, **audit("echo"))
    for process in range(2):
        held = await Held.open(AgentWeaveClient(world.config(CLI, **audit("cli"))))
        for number in range(4):
            result = await held.value.call(str(ECHO), "work", {"text": f"{process}-{number}"})
            assert data_of(result) == {"worked": f"{process}-{number}"}
            log = held.value._parts.audit
            await until(lambda log=log: log.witness().seq == log._seq, "the disk")
        await held.close()
    await world.running(echo).stop()
    (folder / "bundle.pem").write_bytes(world.stack.api.authority.bundle.to_pem())
    yield folder
    await world.clear()


@dataclass
class Logs:
    """A copy of the genuine logs, to be spoilt."""

    folder: Path

    @property
    def echo(self):
        return next(self.folder.glob("logs/echo.*.jsonl"))

    @property
    def first(self):
        """The caller's log of its first process."""
        return next(path for path in self.folder.glob("logs/cli.*.jsonl") if not self._previous(path))

    @property
    def second(self):
        return next(path for path in self.folder.glob("logs/cli.*.jsonl") if self._previous(path))

    def _previous(self, path):
        return json.loads(path.read_bytes().splitlines()[0])["previous"]

    def edit(self, path, change):
        path.write_bytes(b"".join(line + b"\n" for line in change(path.read_bytes().splitlines())))

    def arguments(self, *paths):
        bundle = f"{DOMAIN}={self.folder / 'bundle.pem'}"
        return ["audit", "verify", *map(str, paths or [self.folder / "logs"]), "--bundle", bundle, "--json"]


@pytest.fixture
def logs(genuine, tmp_path):
    shutil.copytree(genuine, tmp_path / "copy")
    return Logs(tmp_path / "copy")


@pytest.fixture
def verify(logs, capsys):
    def run(*paths):
        code = main(logs.arguments(*paths))
        report = json.loads(capsys.readouterr().out)
        assert code == (0 if report["ok"] else 1)
        return report

    honest = run()
    assert honest["ok"], honest["problems"]
    assert len(honest["chains"]) == 3
    return run


def kinds(report):
    return {problem["kind"] for problem in report["problems"]}


def said(report):
    return " ".join(problem["sentence"] for problem in report["problems"])


def rechained(lines, at, change):
    """Change a line as its owner could: every later hash is made to fit."""
    done = [*lines[:at], change(lines[at])]
    assert done[-1] != lines[at]
    for line in lines[at + 1 :]:
        before = json.loads(line)["prev"].encode()
        done.append(line.replace(before, sha256(done[-1]).hexdigest().encode(), 1))
    return done


def other_text(line):
    return line.replace(b'"text":"0-1"', b'"text":"0-9"').replace(b'"text":"1-1"', b'"text":"1-9"')


def by_the_intruder(what):
    return refused_by(Layer.AUDIT, what, by=Adversary.INTRUDER)


@by_the_intruder("a record that says something else")
async def test_an_edited_record(logs, verify):
    logs.edit(logs.echo, lambda lines: [other_text(line) for line in lines])
    report = verify()
    assert kinds(report) == {"changed"}
    assert {problem["file"] for problem in report["problems"]} == {logs.echo.name}


@by_the_intruder("a record taken out")
async def test_a_removed_record(logs, verify):
    logs.edit(logs.echo, lambda lines: lines[:4] + lines[5:])
    assert kinds(verify()) == {"gap"}


@by_the_intruder("two records in each other's place")
async def test_swapped_records(logs, verify):
    logs.edit(logs.echo, lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]])
    assert "reordered" in kinds(verify())


@by_the_intruder("records of two chains in each other's place")
async def test_records_swapped_between_chains(logs, verify):
    one, two = (path.read_bytes().splitlines() for path in (logs.first, logs.second))
    one[2], two[2] = two[2], one[2]
    logs.edit(logs.first, lambda _: one)
    logs.edit(logs.second, lambda _: two)
    report = verify()
    assert "reordered" in kinds(report)
    assert {problem["file"] for problem in report["problems"]} >= {logs.first.name, logs.second.name}


@by_the_intruder("a log cut off at its end, before a restart")
async def test_a_cut_that_the_next_chain_shows(logs, verify):
    logs.edit(logs.first, lambda lines: lines[:-1])
    report = verify(logs.first, logs.second)
    assert kinds(report) == {"cut"}
    assert "the next chain of its log saw" in said(report)


@by_the_intruder("a log cut off at its end, since its last restart")
async def test_a_cut_that_a_peer_shows(logs, verify):
    logs.edit(logs.second, lambda lines: lines[:3])
    report = verify()
    assert kinds(report) == {"cut"}
    assert "a peer (proved by a signature) saw" in said(report)
    alone = verify(logs.second, logs.first)
    assert alone["ok"]
    assert any("nobody else vouches for it" in sentence for sentence in alone["cannot_show"])


@by_the_intruder("a log emptied")
@pytest.mark.parametrize("which", ["echo", "first", "second"])
async def test_an_emptied_log(logs, verify, which):
    getattr(logs, which).write_bytes(b"")
    report = verify()
    assert "cut" in kinds(report)


@by_the_intruder("a record rewritten, with every hash after it")
async def test_a_log_written_anew_from_some_record_on(logs, verify):
    at = next(n for n, line in enumerate(logs.second.read_bytes().splitlines()) if b'"text":"1-1"' in line)
    logs.edit(logs.second, lambda lines: rechained(lines, at, other_text))
    assert verify(logs.second, logs.first)["ok"]  # alone it looks whole
    report = verify()
    assert kinds(report) == {"changed"}
    assert "is not the one that a peer (proved by a signature) saw" in said(report)


@by_the_intruder("a log and its successor after a restart, both rewritten")
async def test_a_log_replaced_at_a_restart(logs, verify):
    """The next chain names the new end, and all hashes fit. A peer remembers."""
    at = next(n for n, line in enumerate(logs.first.read_bytes().splitlines()) if b'"text":"0-1"' in line)
    old = sha256(logs.first.read_bytes().splitlines()[-1]).hexdigest().encode()
    logs.edit(logs.first, lambda lines: rechained(lines, at, other_text))
    new = sha256(logs.first.read_bytes().splitlines()[-1]).hexdigest().encode()
    logs.edit(logs.second, lambda lines: rechained(lines, 0, lambda line: line.replace(old, new)))
    alone = verify(logs.first, logs.second)
    assert alone["ok"]
    assert any("could have replaced both" in sentence for sentence in alone["cannot_show"])
    report = verify()
    assert kinds(report) == {"changed"}
    assert "is not the one that a peer (proved by a signature) saw" in said(report)


@by_the_intruder("a peer's note made to fit a rewritten log")
async def test_a_forged_note_of_a_peer(logs, verify):
    """Whoever edits the peer's log, too, has no key for what the owner signed."""
    lines = logs.echo.read_bytes().splitlines()
    at, record = next((n, one) for n, line in enumerate(lines) if "witness" in (one := json.loads(line)))
    seen = record["witness"]["hash"].encode()
    logs.edit(logs.echo, lambda lines: rechained(lines, at, lambda line: line.replace(seen, b"ab" * 32)))
    report = verify()
    assert kinds(report) == {"evidence"}
    assert "the witness noted is not what the signed head says" in said(report)


@by_the_intruder("a log deleted")
async def test_a_deleted_log(logs, verify):
    logs.first.unlink()
    report = verify()
    assert kinds(report) == {"missing"}
    assert "stood beside this one when it began, and is not here" in said(report)


@by_the_intruder("all logs of an agent replaced by another story")
async def test_another_story_under_a_new_chain(logs, verify):
    """It can't be told from a log that is kept elsewhere; the report says whose is not here."""
    logs.first.unlink()
    logs.second.unlink()
    forged = AuditLog(logs.folder / "logs" / "cli.jsonl", f"{CLI} pid 1")
    forged.append({"event": "call", "reason": "all was well"})
    forged.close()
    report = verify()
    assert report["ok"]
    told = f"2 chains of {CLI} that are mentioned here were not given: kept elsewhere, removed or replaced"
    assert told in report["cannot_show"]


def spoil(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@by_the_intruder("a kept frame that was altered")
@pytest.mark.parametrize("part", ["digest", "middle", "end"])
async def test_an_altered_frame(logs, verify, part):
    (segment,) = logs.folder.glob("logs/echo.*.frames")
    first = next(iter(frames_in(segment)))
    spoil(segment, {"digest": 0, "middle": first.end // 2, "end": first.end - 1}[part])
    report = verify()
    assert kinds(report) == {"changed"}
    assert {problem["file"] for problem in report["problems"]} == {segment.name}


@by_the_intruder("kept frames under each other's digest")
async def test_frames_in_each_other_s_place(logs, verify):
    (segment,) = logs.folder.glob("logs/echo.*.frames")
    one, two, *_ = frames_in(segment)
    content = segment.read_bytes()
    segment.write_bytes(two.digest + content[32 : one.end] + one.digest + content[one.end + 32 :])
    report = verify()
    assert kinds(report) == {"changed"}
    assert said(report).count("is another one, whose head has the digest") == 2


@by_the_intruder("kept frames cut off")
async def test_a_cut_segment(logs, verify):
    (segment,) = logs.folder.glob("logs/echo.*.frames")
    segment.write_bytes(segment.read_bytes()[:-5])
    assert kinds(verify()) == {"cut"}


async def test_without_a_bundle_frames_are_said_not_to_be_checked(logs, capsys):
    """Honest of the report: it says what it could not check."""
    (segment,) = logs.folder.glob("logs/echo.*.frames")
    spoil(segment, 400)
    assert main(["audit", "verify", str(logs.folder / "logs"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert "kept frames were not checked: no trust bundle was given" in report["cannot_show"]
    foreign = [*logs.arguments()[:3], "--bundle", f"else.test={logs.folder / 'bundle.pem'}", "--json"]
    assert main(foreign) == 0
    assert (
        "8 kept frames were not checked: a trust bundle was not given"
        in (json.loads(capsys.readouterr().out)["cannot_show"])
    )


@by_the_intruder("a log that lies, checked by the command as people run it")
async def test_the_command_s_exit_code_says_it(logs, verify):
    def run():
        command = [Path(sys.executable).with_name("agentweave"), *logs.arguments()[:-1]]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    logs.edit(logs.echo, lambda lines: lines[:4] + lines[5:])
    ran = run()
    assert ran.returncode == 1, ran.stderr
    assert "NOT AS THEY WERE WRITTEN" in ran.stdout or '"ok": false' in ran.stdout
    assert f"{logs.echo.name}" in ran.stdout
