"""Attack: the grants file of a running agent is replaced, broken or caught half written."""

from __future__ import annotations

import asyncio
import os

import pytest
import yaml

from agentweave_bus.authz import authorizer, policy_watch
from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.exceptions import AuthorizationError
from tests.integration.connections import until
from tests.integration.probes import ABSENT, CLI, ECHO, OTHER, PATIENCE
from tests.integration.world import metric
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

ALARMS = "agentweave_policy_load_errors_total"
HONEST = {"caller": str(CLI), "callee": str(ECHO), "capabilities": ["work", "say"]}
GRANTS = yaml.safe_dump({"grants": [HONEST]})
WIDER = {"caller": str(CLI), "callee": str(ECHO), "capabilities": ["*"]}
"""What whoever replaces the file wants."""
SLIPS = ("[", "note: 2026-02-30", "note: 0b_", "note: !!bool x", "note: !!int ''", "? [a]")
"""Lines under good grants; each is refused in another way."""
WIDER_TEXT = yaml.safe_dump({"grants": [WIDER]})


@pytest.fixture(scope="module")
def grants(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "grants.yaml"
    path.write_text(GRANTS)
    return path


@pytest.fixture(scope="module", autouse=True)
def _only_asked_for_reloads():
    """Who counts alarms must know who reads the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authorizer, "POLL_SECONDS", 3600.0)
        yield


@pytest.fixture(scope="module")
async def cast(session_world, grants):
    world = session_world
    echo = await world.agent(ECHO, authorization__bundle=str(grants))
    cli, mallory = await world.client(CLI), await world.raw()
    yield world, echo, cli, mallory, await mallory.listen(call_subject(ECHO, "work"))
    await world.clear()


@pytest.fixture
async def attack(attack, grants):
    yield attack
    if grants.is_dir():
        grants.rmdir()
    grants.unlink(missing_ok=True)
    grants.write_text(GRANTS)
    await attack.echo.parts.authorizer.reload()


async def denied(attack, name):
    with pytest.raises(AuthorizationError) as denial:
        await attack.cli.call(str(ECHO), name, timeout=PATIENCE)
    return denial.value


def alarms(attack):
    return metric(attack.echo.parts, ALARMS)


def absent(grants):
    grants.unlink()


def dangling(grants):
    grants.unlink()
    grants.symlink_to(grants.with_name("nowhere.yaml"))


def circular(grants):
    grants.unlink()
    grants.symlink_to(grants)


def directory(grants):
    grants.unlink()
    grants.mkdir()
    grants.rmdir()


def pipe(grants):
    """Whoever opens it waits for somebody to write into it."""
    grants.unlink()
    os.mkfifo(grants)


def text(content):
    return lambda grants: grants.write_text(content)


def bomb():
    """Nine levels of lists of nine: half a billion entries, were they looked through."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join([*lines, "grants:", f"  - caller: *i\n    callee: {ECHO}\n    capabilities: [work]"])


@refused_by(Layer.POLICY_LOAD, "a grants file that can't be read as one", by=Adversary.INTRUDER)
@pytest.mark.parametrize(
    ("replace", "said"),
    [
        (text(WIDER_TEXT + "  - ["), "not valid YAML"),
        (text(WIDER_TEXT + "operator: []\n"), "unknown key"),
        (text(WIDER_TEXT + "grants: []\n"), "'grants' is written twice"),
        (text(WIDER_TEXT.replace("caller:", "callers:")), "callers"),
        (text(WIDER_TEXT.replace(str(ECHO), str(ECHO).upper())), "callee"),
        (text(WIDER_TEXT.replace(str(ECHO), f"{ECHO}/*")), "a callee is named exactly"),
        (text(WIDER_TEXT + "  limits: {max_size: lots}\n"), "is no number"),
        (text("grants: " + "[" * 1_000), "more than 24 levels"),
        (text("!!python/object/apply:os.system ['true']\n"), "is not allowed"),
        (text(bomb()), "grants.yaml:"),
        (text(WIDER_TEXT + "#" * 4_200_000), "larger than"),
        (lambda grants: grants.write_bytes(b"\xff\xfe" + WIDER_TEXT.encode("utf-16-le")), "not UTF-8"),
        (absent, "No such file"),
        (dangling, "No such file"),
        (circular, "symbolic links"),
        (pipe, "it is no regular file"),
    ],
    ids=[
        "cut short", "a key misspelled", "a key twice", "an entry's key misspelled", "no SPIFFE ID", "a pattern",
        "a limit that is no number", "nested without end", "a program", "a bomb", "too large", "UTF-16",
        "absent", "a dangling link", "a circular link", "a pipe",
    ],
)  # fmt: skip
async def test_a_bad_file_changes_nothing_but_the_alarm(attack, grants, replace, said, caplog):
    judge = attack.echo.parts.authorizer
    revision, before = judge.revision, alarms(attack)
    replace(grants)
    assert not await judge.reload(force=False)
    assert alarms(attack) == before + 1
    assert judge.revision == revision
    alarm = next(record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert alarm.startswith("the new policy was refused, the old one stays: ")
    assert said in alarm
    assert len(alarm) < 4_000  # it names the file five times
    assert not await judge.reload(force=False)
    assert alarms(attack) == before + 1  # told once
    assert "no grant lets" in (await denied(attack, "whoami")).reason  # as the old one says
    await attack.cli.ask(ECHO, "say", {"text": "x"})
    assert attack.echo.ran == ["work", "say"]


@refused_by(Step.AUTHORIZATION, "a call after the grants are emptied", by=Adversary.CALLER)
@pytest.mark.parametrize("content", ["", "---\n", "# nothing\n", "grants: []\n", "{}\n"], ids=repr)
async def test_an_empty_file_grants_nothing(attack, grants, content):
    grants.write_text(content)
    assert await attack.echo.parts.authorizer.reload(force=False)
    denial = await denied(attack, "work")
    assert "no grant lets" in denial.reason
    grants.write_text(GRANTS)
    assert await attack.echo.parts.authorizer.reload(force=False)
    await attack.refused(reason="no grant lets")


@refused_by(Step.AUTHORIZATION, "a call that is allowed by a grants file half written", by=Adversary.CALLER)
async def test_a_file_in_the_middle_of_being_written(attack, grants, monkeypatch):
    """The first half of a file can allow more than the whole, without what limits it."""
    monkeypatch.setattr(policy_watch, "QUIET_SECONDS", 0.3)
    half = GRANTS + f"- caller: {OTHER}\n  callee: {ECHO}\n  capabilities: [work]\n"
    rest = f"  on_behalf_of: {CLI}\n"
    old = attack.echo.parts.authorizer.revision
    grants.write_text(half)
    reading = asyncio.create_task(attack.echo.parts.authorizer.reload(force=False))
    await asyncio.sleep(0.05)  # it is looked at by now
    with grants.open("a") as file:
        file.write(rest)
    assert await reading
    assert attack.echo.parts.authorizer.revision != old
    forged = forged_call(attack.world.issue(OTHER), iss=OTHER)
    await attack.send(forged.frame, reply=reply_of(forged, OTHER))
    await attack.refused(reason="asks for an origin that on_behalf_of names")


async def test_a_running_agent_sees_for_itself_that_its_grants_turned_bad_and_good_again(
    attack, tmp_path, monkeypatch
):
    """Honest operator, who slips, and slips again. Nobody calls ``reload`` here."""
    monkeypatch.setattr(authorizer, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(policy_watch, "QUIET_SECONDS", 0.01)
    own, ask = tmp_path / "grants.yaml", attack.cli.ask
    own.write_text(GRANTS.replace(str(ECHO), str(ABSENT)))
    agent = await attack.world.agent(ABSENT, authorization__bundle=str(own))
    revision = agent.parts.authorizer.revision
    assert metric(agent.parts, ALARMS) == 0
    for told, slip in enumerate(SLIPS, 1):
        own.write_text(f"{WIDER_TEXT}{slip}\n")
        await until(lambda told=told: metric(agent.parts, ALARMS) == told, "the alarm")
        assert agent.parts.authorizer.revision == revision
        await ask(ABSENT, "say", {"text": "by the old grants"})
    own.write_text(WIDER_TEXT.replace(str(ECHO), str(ABSENT)))
    await until(lambda: agent.parts.authorizer.revision != revision, "the new revision")
    assert metric(agent.parts, ALARMS) == len(SLIPS)
    await ask(ABSENT, "whoami")
