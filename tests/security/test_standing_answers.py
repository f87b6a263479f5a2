"""Attack: an answer of the policy that stands for a while, used for what it was not given for."""

from __future__ import annotations

import time

import pytest

from agentweave_bus.authz import authorizer
from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.exceptions import AuthorizationError
from tests.integration.probes import CLI, ECHO, FRONT, OTHER, PATIENCE
from tests.integration.world import metric
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(find_opa() is None, reason="no opa binary: 'make tools' builds what compiles Rego"),
]

PACKAGE = "package probe.authz\n\nimport rego.v1\n"
POLICY = (
    PACKAGE
    + f"""
default allow := false

allow if {{
	input.action in ["work", "say", "whoami", "wait_safe"]
	input.caller_spiffe_id in ["{CLI}", "{FRONT}"]
	not suspicious
}}

suspicious if input.context.via[_].iss == "{OTHER}"

suspicious if input.context.via[_].cap == "inner"

suspicious if input.context.principal.sub == "eve"

suspicious if input.context.principal.as == "root"

suspicious if "{FRONT}#*" in input.context.scope

suspicious if input.action in data.withdrawn

decision := {{"allow": allow, "reason": "probe", "limits": limits}}

standing := {{"allow": true, "cache_seconds": 3600, "limits": limits}} if allow

default limits := {{}}

limits := {{"max_per_minute": 3}} if input.action == "whoami"
"""
)
WITHOUT_PAYLOAD = 'standing := {"allow": true, "cache_seconds": 30}'


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    (folder / "own.rego").write_text(POLICY)
    (folder / "data.yaml").write_text("withdrawn: []\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _only_asked_for_reloads():
    """What stands ends with each reading of the policy: none but the tests' own, then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authorizer, "POLL_SECONDS", 3600.0)
        yield


@pytest.fixture(scope="module")
async def cast(session_world, policies):
    world = session_world
    settings = {"authorization__bundle": str(policies), "authorization__policy_path": "probe/authz"}
    echo, cli, mallory = await world.agent(ECHO, **settings), await world.client(CLI), await world.raw()
    yield world, echo, cli, mallory, await mallory.listen(call_subject(ECHO, "work"))
    await world.clear()


@pytest.fixture
async def attack(attack):
    """The honest call's answer stands: a second call is allowed without asking."""
    attack.echo.parts.authorizer.forget_standing()  # of what earlier tests asked
    for stands in (False, True):
        await attack.cli.ask(ECHO, "work", {"text": "again"})
        assert reused(attack) is stands
        attack.echo.ran.remove("work")
    return attack


def reused(attack):
    return attack.world.audit("echo", event="admission")[-1].get("reused", False)


async def sent(attack, iss=CLI, via=(), **head):
    if via:
        head["exp"] = via[-1].head.exp
    forged = forged_call(attack.world.issue(iss), iss=iss, via=via, **head)
    await attack.send(forged.frame, reply=reply_of(forged, iss))


async def admitted_anew(attack, iss=CLI, **head):
    """What the answer was not given for is asked about, and may be allowed for its own sake."""
    await sent(attack, iss, **head)
    record = await attack.admitted()
    assert not record.get("reused", False), record
    attack.echo.ran.remove("work")
    attack.reflected.get_nowait()


def link_of(attack, iss, cap="relay"):
    """The proof that ``iss`` asked ``front`` for something."""
    asked = {"aud": FRONT, "cap": cap, "sub": call_subject(FRONT, cap)}
    return forged_call(attack.world.issue(iss), iss=iss, **asked).link


WORK_ONLY = (f"{ECHO}#work",)
ANN = {"iss": "https://login.example", "sub": "ann"}


@refused_by(Step.AUTHORIZATION, "another caller under a standing answer", by=Adversary.AGENT)
async def test_another_caller(attack):
    await admitted_anew(attack, FRONT, via=(link_of(attack, CLI),))
    await sent(attack, OTHER)
    await attack.refused(reason="probe")


@refused_by(
    Step.AUTHORIZATION, "another origin of the delegation under a standing answer", by=Adversary.CALLER
)
async def test_another_origin_of_the_delegation(attack):
    await admitted_anew(attack, FRONT, via=(link_of(attack, CLI),))
    await sent(attack, FRONT, via=(link_of(attack, OTHER),))
    await attack.refused(reason="probe")


@refused_by(Step.AUTHORIZATION, "another capability in the delegation", by=Adversary.CALLER)
async def test_another_capability_in_the_delegation(attack):
    await admitted_anew(attack, FRONT, via=(link_of(attack, CLI),))
    await sent(attack, FRONT, via=(link_of(attack, CLI, "inner"),))
    await attack.refused(reason="probe")


@refused_by(Step.AUTHORIZATION, "another principal under a standing answer", by=Adversary.CALLER)
@pytest.mark.parametrize(
    "principal",
    [ANN | {"sub": "eve"}, ANN | {"as": "root"}],
    ids=["sub", "further claim"],
)
async def test_another_principal(attack, principal):
    await admitted_anew(attack, prn=ANN, scope=WORK_ONLY)
    await sent(attack, prn=principal, scope=WORK_ONLY)
    await attack.refused(reason="probe")


@refused_by(Step.AUTHORIZATION, "another scope under a standing answer", by=Adversary.CALLER)
async def test_another_scope(attack):
    await admitted_anew(attack, scope=WORK_ONLY)
    await sent(attack, scope=(f"{ECHO}#work", f"{FRONT}#*"))
    await attack.refused(reason="probe")


@refused_by(Step.AUTHORIZATION, "a standing answer after what was granted is withdrawn", by=Adversary.CALLER)
async def test_an_answer_of_an_older_revision(attack, policies):
    judge = attack.echo.parts.authorizer
    old = judge.revision
    (policies / "data.yaml").write_text("withdrawn: [work]\n")
    try:
        assert await judge.reload(force=False)
        assert judge.revision != old
        await sent(attack)
        record = await attack.refused(reason="probe")
    finally:
        (policies / "data.yaml").write_text("withdrawn: []\n")
        await judge.reload()
    assert record["revision"] != old == judge.revision


@refused_by(Step.AUTHORIZATION, "more uses of a standing answer than its limit allows", by=Adversary.CALLER)
async def test_a_limit_counts_every_use(attack):
    ids = set()
    for number in range(3):
        await attack.cli.ask(ECHO, "whoami")
        assert reused(attack) == (number > 0)
        ids.add(attack.world.audit("echo", event="admission")[-1]["decision_id"])
        attack.echo.ran.remove("whoami")
    assert len(ids) == 1  # each use names the one decision
    with pytest.raises(AuthorizationError, match="max_per_minute is 3 and used up"):
        await attack.cli.call(str(ECHO), "whoami", timeout=PATIENCE)
    record = await attack.refused(reason="max_per_minute is 3 and used up")
    assert record["reused"]


async def test_no_answer_stands_for_longer_than_a_minute(attack):
    """Honest calls; the policy says an hour. The clock is the agent's own, set forward here."""
    judge = attack.echo.parts.authorizer
    try:
        for ahead, stands in ((58, True), (61, False)):
            judge._monotonic = lambda ahead=ahead: time.monotonic() + ahead
            await attack.cli.ask(ECHO, "work", {"text": "x"})
            assert reused(attack) is stands
    finally:
        judge._monotonic = time.monotonic
        judge.forget_standing()


@refused_by(Layer.POLICY_LOAD, "a standing rule that reads the payload or the clock", by=Adversary.INTRUDER)
@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (f"{WITHOUT_PAYLOAD} if not input.context.payload.forbidden", "input.context.payload.forbidden"),
        (f"{WITHOUT_PAYLOAD} if time.now_ns() > 0", "the clock"),
        (f"{WITHOUT_PAYLOAD} if input.context.task_id", "input.context.task_id"),
    ],
    ids=["payload", "clock", "id"],
)
async def test_a_standing_rule_that_would_not_hold(attack, policies, rule, reason, caplog):
    judge = attack.echo.parts.authorizer
    errors = metric(attack.echo.parts, "agentweave_policy_load_errors_total")
    revision = judge.revision
    (policies / "own.rego").write_text(f"{PACKAGE}\ndefault allow := true\n\n{rule}\n")
    try:
        assert not await judge.reload(force=False)
        assert metric(attack.echo.parts, "agentweave_policy_load_errors_total") == errors + 1
        assert judge.revision == revision
        assert reason in caplog.messages[-1]
        assert "the old one stays" in caplog.messages[-1]
        with pytest.raises(AuthorizationError):  # the new one would allow it
            await attack.cli.call(str(ECHO), "decline", timeout=PATIENCE)
        await attack.cli.ask(ECHO, "say", {"text": "x"})
    finally:
        (policies / "own.rego").write_text(POLICY)
        assert await judge.reload(force=False)
