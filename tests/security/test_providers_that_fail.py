"""Attack: a call when the authorization engine of the user's own raises, hangs or says no clear yes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from agentweave_bus.authz import AuthorizationProvider, AuthzDecision
from agentweave_bus.bus import admission
from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.exceptions import AuthorizationError, CallTimeoutError, PolicyUnavailableError
from tests.integration.probes import CLI, ECHO, PATIENCE, Probe
from tests.security.catalogue import Adversary, refused_by

pytestmark = pytest.mark.anyio

UNASKED = "the policy could not be asked"


class Scripted(AuthorizationProvider):
    """Says yes, or does what a test wants."""

    def __init__(self):
        self.answer = yes

    async def authorize(self, context):
        return await self.answer(context)


async def yes(_context):
    return AuthzDecision(allowed=True, reason="scripted")


class Judged(Probe):
    def __init__(self, config, **options):
        super().__init__(config, authz_provider=Scripted(), **options)


@pytest.fixture(scope="module")
async def cast(session_world):
    world = session_world
    echo, cli, mallory = await world.agent(ECHO, Judged), await world.client(CLI), await world.raw()
    yield world, echo, cli, mallory, await mallory.listen(call_subject(ECHO, "work"))
    await world.clear()


async def denied(attack, answer):
    provider = attack.echo.authz_provider
    provider.answer = answer
    try:
        with pytest.raises(AuthorizationError) as denial:
            await attack.cli.call(str(ECHO), "work", {"text": "x"}, timeout=PATIENCE)
    finally:
        provider.answer = yes
    assert denial.value.direction == "inbound"
    return denial.value


def raising(error):
    async def answer(_context):
        raise error

    return answer


def returning(value):
    async def answer(_context):
        return value

    return answer


@refused_by(Step.AUTHORIZATION, "a call when the user's own engine raises", by=Adversary.CALLER)
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("database password hunter2"), "the authorization engine failed (RuntimeError)"),
        (KeyError("role"), "the authorization engine failed (KeyError)"),
        (TimeoutError(), "the policy gave no answer within 1 s"),
        (PolicyUnavailableError("LDAP is away"), "LDAP is away"),
        (RecursionError(), "the authorization engine failed (RecursionError)"),
        (asyncio.CancelledError(), "the authorization engine failed (CancelledError)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
async def test_an_engine_that_raises(attack, error, reason):
    denial = await denied(attack, raising(error))
    assert denial.reason == UNASKED  # what went wrong there is not the caller's business
    record = await attack.refused(reason=reason)
    assert "hunter2" not in str(record)


@refused_by(Step.AUTHORIZATION, "a call when the user's own engine hangs", by=Adversary.CALLER)
async def test_an_engine_that_hangs(attack):
    async def hang(_context):
        await asyncio.Event().wait()

    authorizer = attack.echo.parts.authorizer
    usual = authorizer._timeout_s
    authorizer._timeout_s = 0.05
    try:
        denial = await denied(attack, hang)
    finally:
        authorizer._timeout_s = usual
    assert denial.reason == UNASKED
    await attack.refused(reason="the policy gave no answer within 0.05 s")


@refused_by(Step.AUTHORIZATION, "an engine's answer that is true, but no decision", by=Adversary.CALLER)
@pytest.mark.parametrize(
    "value",
    [True, 1, "allow", "yes", {"allow": True}, [True], None, SimpleNamespace(allowed=True), AuthzDecision],
    ids=lambda value: type(value).__name__,
)
async def test_an_answer_that_is_no_decision(attack, value):
    denial = await denied(attack, returning(value))
    assert denial.reason == f"the provider answered with a {type(value).__name__}, not a decision"
    await attack.refused(reason="not a decision")


@refused_by(Step.AUTHORIZATION, "a decision made of words and numbers", by=Adversary.CALLER)
@pytest.mark.parametrize("verdict", ["yes", 1, "true", [True], None, {}], ids=repr)
async def test_a_decision_that_is_no_clear_yes(attack, verdict):
    async def answer(_context):
        return AuthzDecision(allowed=verdict)

    assert (await denied(attack, answer)).reason == UNASKED
    await attack.refused(reason="the authorization engine failed (TypeError)")


@refused_by(Step.AUTHORIZATION, "a yes that needs a person's approval first", by=Adversary.CALLER)
async def test_a_yes_that_wants_approval(attack):
    await denied(attack, returning(AuthzDecision(allowed=True, reason="large", require_approval=True)))
    await attack.refused(
        reason="needs a person's approval, and the policy names nobody who could give it: large"
    )


@refused_by(Step.AUTHORIZATION, "a yes whose limit is used up", by=Adversary.CALLER)
async def test_a_limit_of_a_custom_answer_is_counted(attack):
    """Limits are counted by the agent, whoever says them."""
    await denied(attack, returning(AuthzDecision(allowed=True, limits={"max_per_minute": 0})))
    await attack.refused(reason="max_per_minute is 0 and used up")


async def test_a_fault_that_no_step_foresaw_is_a_refusal_that_tells_nothing(attack, monkeypatch, caplog):
    """Honest caller, and a fault of our own inside the gate: it is answered at once, and there is a record."""
    parts, fault = attack.echo.parts, KeyError("database password hunter2")

    def fails(*_, **__):
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(parts.authorizer._limiter, "take", fails)
        limited = AuthzDecision(allowed=True, limits={"daily_limit": 1})
        denial = await denied(attack, returning(limited))
    assert denial.reason == "not able to admit the call"
    (record,) = attack.refusals()
    assert (record["step_name"], record["reason"]) == ("authorization", "admission failed (KeyError)")
    assert record["iss"] == str(CLI)
    assert [line.exc_info[1] for line in caplog.records if line.exc_info] == [fault]
    await attack.cli.ask(ECHO, "say", {"text": "its place was given back"})
    assert attack.echo.ran == ["work", "say"]


async def test_a_fault_before_the_sender_has_a_place_is_recorded_and_not_answered(attack, monkeypatch):
    """Honest caller, of whom nothing is settled yet when something of our own breaks."""

    def fails(*_, **__):
        raise KeyError("nobody foresaw this")

    with monkeypatch.context() as patch:
        patch.setattr(admission, "check_time_now", fails)
        with pytest.raises(CallTimeoutError):
            await attack.cli.call(str(ECHO), "work", {"text": "x"}, timeout=0.4)
    (record,) = attack.refusals()
    assert (record["step_name"], record["reason"]) == ("authorization", "admission failed (KeyError)")
    assert attack.echo.ran == ["work"]
