"""The caller's side, step by step. The transport is played, so that each of its endings can be had."""

from __future__ import annotations

import json

import pytest
import yaml

from agentweave_bus.authz import AuditLog, AuthorizationProvider, Authorizer, AuthzDecision, Grants
from agentweave_bus.authz.circuit_breaker import BreakerSettings
from agentweave_bus.bus.requests import Answer
from agentweave_bus.client import CalleeBreakers, Client, Parent, reach_of
from agentweave_bus.exceptions import (
    AgentCallError,
    AuditError,
    AuthorizationError,
    BusError,
    CallRefusedError,
    CallTimeoutError,
    CircuitOpenError,
    ConnectionLostError,
    FederationError,
    MalformedEnvelopeError,
    NoResponderError,
    SvidUnavailableError,
    UnreachableError,
)
from agentweave_bus.observability.metrics import Metrics
from agentweave_bus.spiffe_id import SpiffeID

pytestmark = pytest.mark.anyio

ME, CALLEE = SpiffeID("spiffe://a.test/client/me"), SpiffeID("spiffe://a.test/agent/x")
NOW = 1_700_000_000_000
GOOD = Answer({"status": "completed", "messages": []}, b"\0" * 32)


class Provider(AuthorizationProvider):
    def __init__(self):
        self.allowed, self.asked = True, []

    async def authorize(self, context):
        self.asked.append(context)
        return AuthzDecision(allowed=self.allowed, reason="because")


class Transport:
    def __init__(self):
        self.ending, self.requests = GOOD, []

    async def call(self, request):
        self.requests.append(request)
        if isinstance(self.ending, Exception):
            raise self.ending
        return self.ending


class Setup:
    def __init__(self, folder):
        self.provider, self.transport = Provider(), Transport()
        self.audit = AuditLog(folder / "audit.jsonl", "test")
        self.now, self.monotonic = NOW, 5_000
        self.metrics = Metrics.create()
        self.client = Client(
            me=ME,
            authorizer=Authorizer(self.provider),
            audit=self.audit,
            transport=self.transport,
            breakers=CalleeBreakers(BreakerSettings(2, 1, 30.0)),
            allowed_trust_domains=lambda: frozenset({"a.test"}),
            metrics=self.metrics,
            clock_ms=lambda: self.now,
            monotonic_ms=lambda: self.monotonic,
            max_timeout=60,
        )

    async def call(self, **options):
        return await self.client.call(str(CALLEE), "do", {"n": 1}, **options)

    def events(self):
        return [json.loads(line) for line in self.audit.file.read_text().splitlines()][1:]


@pytest.fixture
def setup(tmp_path):
    made = Setup(tmp_path)
    yield made
    made.audit.close()


async def test_a_call_is_asked_for_then_carried(setup):
    assert (await setup.call(timeout=5)).status == "completed"
    (asked,) = setup.provider.asked
    assert (asked.caller, asked.callee, asked.action, asked.direction) == (ME, CALLEE, "do", "outbound")
    assert asked.payload == {"n": 1}
    (request,) = setup.transport.requests
    assert request.deadline_ms == NOW + 5_000


async def test_a_denial_touches_nothing_and_is_recorded(setup):
    setup.provider.allowed = False
    with pytest.raises(AuthorizationError) as denial:
        await setup.call()
    assert setup.transport.requests == []
    (record,) = setup.events()
    assert record["audit_id"] == denial.value.audit_id
    assert (denial.value.reason, denial.value.direction) == ("because", "outbound")


async def test_a_denial_stands_also_when_it_can_not_be_recorded(setup, monkeypatch):
    setup.provider.allowed = False

    def full(_record):
        raise AuditError("disk full")

    monkeypatch.setattr(type(setup.audit), "append", lambda _self, record: full(record))
    with pytest.raises(AuthorizationError, match="the audit log failed"):
        await setup.call()
    assert setup.transport.requests == []


async def test_a_parents_deadline_is_never_exceeded(setup):
    parent = Parent(
        links=(), via=({"iss": "o"},), deadline_ms=NOW + 3_000, principal={"iss": "i", "sub": "s"}
    )
    await setup.call(timeout=50, parent=parent)
    await setup.call(timeout=1, parent=parent)
    assert [one.deadline_ms for one in setup.transport.requests] == [NOW + 3_000, NOW + 1_000]
    assert setup.provider.asked[0].principal == {"iss": "i", "sub": "s"}
    assert [dict(one) for one in setup.provider.asked[0].via] == [{"iss": "o"}]
    setup.now = NOW + 3_000
    with pytest.raises(CallTimeoutError, match="no time is left"):
        await setup.call(parent=parent)
    await setup.call(timeout=10_000)
    assert setup.transport.requests[-1].deadline_ms == setup.now + 60_000


async def test_only_an_origin_names_a_principal(setup):
    parent = Parent(links=(), via=(), deadline_ms=NOW + 3_000)
    with pytest.raises(CallRefusedError, match="only the origin"):
        await setup.call(parent=parent, principal={"iss": "i", "sub": "s"})
    assert setup.provider.asked == []
    await setup.call(principal={"iss": "i", "sub": "s"})
    assert setup.transport.requests[0].scope == (f"{CALLEE}#do",)


async def test_an_unlisted_domain_is_no_denial(setup):
    with pytest.raises(FederationError) as refusal:
        await setup.client.call("spiffe://b.test/agent/x", "do")
    assert refusal.value.trust_domain == "b.test"
    assert setup.provider.asked == []


FAILING = [CallTimeoutError("late"), NoResponderError("nobody")]
NEUTRAL = [
    ConnectionLostError("lost"),
    UnreachableError("no broker"),
    SvidUnavailableError("expired"),
    BusError("gone"),
    AuthorizationError("broker", direction="broker"),
    CallRefusedError("busy", step="local"),
    MalformedEnvelopeError("too large"),
    AuditError("disk full"),
]
WELL = [
    AuthorizationError("no", direction="inbound"),
    CallRefusedError("no", step="payload"),
    AgentCallError("?"),
]


async def fails(setup, times=1):
    for _ in range(times):
        with pytest.raises(AgentCallError) as error:
            await setup.call()
    return error.value


@pytest.mark.parametrize("ending", FAILING, ids=lambda one: type(one).__name__)
async def test_a_callee_that_does_not_answer_is_left_alone(setup, ending):
    setup.transport.ending = ending
    await fails(setup, 2)
    assert isinstance(await fails(setup), CircuitOpenError)
    assert len(setup.transport.requests) == 2
    setup.now = NOW + 3_600_000  # a clock that is set closes no breaker
    assert isinstance(await fails(setup), CircuitOpenError)
    setup.transport.ending, setup.monotonic = GOOD, 35_001
    assert (await setup.call()).status == "completed"


@pytest.mark.parametrize("ending", NEUTRAL + WELL, ids=lambda one: f"{type(one).__name__}-{one}")
async def test_what_is_not_the_callees_fault_opens_nothing(setup, ending):
    setup.transport.ending = ending
    assert not isinstance(await fails(setup, 5), CircuitOpenError)
    assert len(setup.transport.requests) == 5


@pytest.mark.parametrize("ending", NEUTRAL, ids=lambda one: f"{type(one).__name__}-{one}")
async def test_what_says_nothing_of_the_callee_closes_nothing(setup, ending):
    setup.transport.ending = FAILING[0]
    await fails(setup, 2)
    setup.monotonic += 30_001
    setup.transport.ending = ending
    await fails(setup)  # the probe, which learned nothing
    setup.transport.ending = FAILING[0]
    assert isinstance(await fails(setup), CallTimeoutError)  # the next probe
    assert isinstance(await fails(setup), CircuitOpenError)


@pytest.mark.parametrize(
    ("ending", "wanted"),
    [
        (SvidUnavailableError("expired"), UnreachableError),
        (BusError("gone"), UnreachableError),
        (AuditError("disk full"), CallRefusedError),
        (MalformedEnvelopeError("too large"), CallRefusedError),
        (Answer({"status": "nonsense"}, b""), AgentCallError),
        (Answer(3, b""), AgentCallError),
    ],
    ids=["svid", "bus", "audit", "envelope", "status", "number"],
)
async def test_every_ending_is_an_agent_call_error(setup, ending, wanted):
    setup.transport.ending = ending
    error = await fails(setup)
    assert type(error) is wanted
    assert str(CALLEE) in str(error) or str(ending) in str(error)


async def test_each_ending_is_counted(setup):
    def counted(status):
        labels = {"direction": "outbound", "capability": "other", "status": status}
        return setup.metrics.registry.get_sample_value("agentweave_requests_total", labels)

    await setup.call()
    for ending in (WELL[0], WELL[1], FAILING[0]):
        setup.transport.ending = ending
        await fails(setup)
    setup.transport.ending = Answer({"status": "failed", "messages": [], "error": "x"}, b"")
    assert (await setup.call()).status == "failed"
    assert [counted(one) for one in ("success", "denied", "refused", "error")] == [1, 1, 1, 2]


def test_the_default_scope_is_what_the_grants_let_the_callee_reach(tmp_path):
    names = {name: SpiffeID(f"spiffe://a.test/agent/{name}") for name in "wxyz"}
    entries = [("x", "y", "go"), ("y", "z", "on"), ("z", "x", "round"), ("w", "z", "not")]
    path = tmp_path / "grants.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "grants": [
                    {"caller": str(names[a]), "callee": str(names[b]), "capabilities": [c]}
                    for a, b, c in entries
                ]
            }
        )
    )
    scope = reach_of(Grants.load(path), names["x"], "do")
    assert set(scope) == {f"{names['x']}#do", f"{names['y']}#go", f"{names['z']}#on", f"{names['x']}#round"}
    many = {
        "grants": [
            {
                "caller": str(names["x"]),
                "callee": str(names["y"]),
                "capabilities": [f"c{n}" for n in range(70)],
            }
        ]
    }
    path.write_text(yaml.safe_dump(many))
    with pytest.raises(CallRefusedError, match="at most 64"):
        reach_of(Grants.load(path), names["x"], "do")
    assert reach_of(None, names["x"], "do") == (f"{names['x']}#do",)
