"""Attack: an identity or a capability whose name looks like another's to some part of the bus.

Whatever is derived from a name (subjects, inboxes, streams, claim keys, broker users and what they may do) must
keep two identities apart: also those that differ in case only, or in where a dot or a slash stands.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from nats.aio.msg import Msg

from agentweave_bus.authz import Grants
from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.streams import claim_stream_name
from agentweave_bus.bus.subjects import (
    Family,
    agent_prefix,
    api_inbox,
    call_subject,
    claim_subject,
    reply_inbox,
)
from agentweave_bus.control.broker import broker_users, permissions_of
from agentweave_bus.envelope import claim_key
from agentweave_bus.exceptions import AuthorizationError, InvalidSpiffeIdError
from agentweave_bus.spiffe_id import SpiffeID
from tests.integration.connections import Raw, heard_within, until
from tests.integration.probes import CLI, ECHO, MALLORY, Probe
from tests.integration.world import Caller, World
from tests.security.catalogue import Adversary, Layer, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

TOKEN = "A" * 22
LETTERS = "aA.-_"
domains = st.text("a.-_", min_size=1, max_size=4)
segments = st.text(LETTERS, min_size=1, max_size=4).filter(lambda text: text not in {".", ".."})
identities = st.builds(
    lambda domain, path: SpiffeID.of(domain, *path), domains, st.lists(segments, min_size=1, max_size=3)
)
"""Of so few letters that near misses are common."""


@st.composite
def near_misses(draw):
    """Two identities that differ in one character, or in where a segment begins."""
    one = draw(identities)
    text = one.removeprefix("spiffe://")
    place = draw(st.integers(0, len(text) - 1))
    other = text[:place] + draw(st.sampled_from("aA.-_/")) + text[place + draw(st.integers(0, 1)) :]
    try:
        near = SpiffeID(f"spiffe://{other}")
    except InvalidSpiffeIdError:
        near = one
    assume(near != one and near.path)
    return one, near


def own(identity):
    """Every name that belongs to an identity alone."""
    yield from (agent_prefix(family, identity) for family in Family)
    yield claim_stream_name(identity)
    yield call_subject(identity, "a")
    yield claim_subject(identity, "0" * 64)
    yield f"{api_inbox(identity, TOKEN)}.x"
    yield f"{reply_inbox(identity, TOKEN)}.x"


def covers(pattern, subject):
    """Whether a NATS subscription or permission ``pattern`` takes in ``subject``."""
    wanted, tokens = pattern.split("."), subject.split(".")
    for place, token in enumerate(wanted):
        if token == ">":
            return len(tokens) > place
        if place >= len(tokens) or token not in ("*", tokens[place]):
            return False
    return len(wanted) == len(tokens)


@refused_by(Layer.NAMES, "an identity whose names collide with another's", by=Adversary.AGENT)
@given(near_misses())
def test_no_two_identities_share_a_name(pair):
    one, other = pair
    assert not set(own(one)) & set(own(other))
    users = {user["user"] for user in broker_users(Grants(), [one, other], control=[])}
    assert users == {str(one), str(other)}


@refused_by(Layer.NAMES, "an identity whose permissions reach another's subjects", by=Adversary.AGENT)
@given(near_misses())
def test_no_permission_of_one_covers_a_subject_of_another(pair):
    one, other = pair
    allowed = permissions_of(one, Grants(), [one, other])
    patterns = [*allowed["publish"]["allow"], *allowed["subscribe"]["allow"]]
    subjects = [*own(other), f"$JS.API.STREAM.INFO.{claim_stream_name(other)}"]
    assert [(pattern, name) for pattern in patterns for name in subjects if covers(pattern, name)] == []


@refused_by(
    Layer.NAMES,
    "a claim key that two calls share, by moving the border between its parts",
    by=Adversary.CALLER,
)
@given(st.text("ab", min_size=1, max_size=8), st.data())
def test_no_two_calls_share_a_claim_key(text, data):
    """Issuer, recipient, capability and id run together to the same text, and still give another key."""
    borders = st.lists(st.integers(0, len(text)), min_size=3, max_size=3).map(sorted)
    one, other = (cut(text, data.draw(borders)) for _ in range(2))
    assert (claim_key(*one) == claim_key(*other)) == (one == other)


def cut(text, borders):
    starts, ends = [0, *borders], [*borders, len(text)]
    return tuple(text[start:end] for start, end in zip(starts, ends, strict=True))


@refused_by(Step.HEAD, "an identity written in another way than its own", by=Adversary.AGENT)
@pytest.mark.parametrize("field", ["aud", "iss"])
@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        lambda name: name + "/",
        lambda name: name.replace("demo.test", "DEMO.test"),
        lambda name: name.replace("/agent/", "//agent/").replace("/client/", "//client/"),
        lambda name: name.replace("/agent/", "/agent/./").replace("/client/", "/client/./"),
        lambda name: name.replace("/agent/", "/x/../agent/").replace("/client/", "/x/../client/"),
        lambda name: name.replace(".", "="),
        lambda name: name.replace("c", "%63"),
        lambda name: name + "\n",
        lambda name: name + "?x",
        lambda name: name.replace("c", "\u0441"),
    ],
    ids=[
        "case",
        "slash",
        "domain",
        "empty",
        "dot",
        "dots",
        "equals",
        "percent",
        "newline",
        "query",
        "cyrillic",
    ],
)
async def test_another_spelling(attack, field, change):
    raw = {field: change(str(ECHO if field == "aud" else CLI))}
    forged = forged_call(attack.world.issue(CLI), raw=raw)
    await attack.send(forged.frame, reply=attack.message.reply)
    await attack.refused()


@refused_by(Step.HEAD, "a capability's name that reaches further than one token", by=Adversary.CALLER)
@pytest.mark.parametrize(
    "name", ["work.x", "*", ">", "Work", "work ", "", "work\n", "-work", "w" * 65, "w\u043erk"]
)
async def test_a_capability_that_is_no_token(attack, name):
    forged = forged_call(attack.world.issue(CLI), raw={"cap": name})
    await attack.send(forged.frame, reply=attack.message.reply)
    await attack.refused()


PAY = SpiffeID("spiffe://demo.test/agent/pay.x")
ALIKE = [
    SpiffeID(f"spiffe://demo.test/{path}")
    for path in (
        "agent/Pay.x",
        "agent/pay-x",
        "agent/pay/x",
        "agent/pay",
        "agent/pay.x.y",
        "agent.pay.x",
        "Agent/pay.x",
    )
]
LEDGER = SpiffeID("spiffe://demo.test/agent/ledger")


@dataclass
class Namesakes:
    """``pay`` and ``ledger`` run; of the others it is heard what reaches their subjects."""

    world: World
    pay: Probe
    ledger: Probe
    cli: Caller
    mallory: Raw
    heard: dict[SpiffeID, asyncio.Queue[Msg]]


@pytest.fixture(scope="module")
async def namesakes(tmp_path_factory):
    """Only ``pay.x`` is granted anything, and only it may be called. Both agents have one name and one log."""
    grants = [
        {"caller": str(CLI), "callee": [str(PAY)], "capabilities": ["say", "work"]},
        {"caller": str(PAY), "callee": [str(LEDGER)], "capabilities": ["say"]},
    ]
    folder = tmp_path_factory.mktemp("names")
    same = {
        "agent__name": "same",
        "authorization__audit": {"destination": str(folder / "audit" / "shared.jsonl")},
    }
    names = (PAY, *ALIKE, LEDGER, CLI)
    async with World.make(folder, identities=names, grants={"grants": grants}) as world:
        heard = {}
        for one in ALIKE:
            raw = await world.raw(one)
            heard[one] = await raw.listen(f"{agent_prefix(Family.CALL, one)}.*")
            assert raw.refused == []
        pay, ledger = await world.agent(PAY, **same), await world.agent(LEDGER, **same)
        yield Namesakes(world, pay, ledger, await world.client(CLI), await world.raw(), heard)


@refused_by(Layer.NAMES, "receiving the calls of an agent with a similar name", by=Adversary.AGENT)
async def test_calls_reach_their_agent_alone(namesakes):
    for number in range(10):
        await namesakes.cli.ask(PAY, "work", {"text": str(number)})
    assert namesakes.pay.ran == ["work"] * 10
    assert [one for one, queue in namesakes.heard.items() if not queue.empty()] == []
    await namesakes.mallory.send(call_subject(ALIKE[0], "work"), b"x")
    assert (await heard_within(namesakes.heard[ALIKE[0]])).data == b"x"
    await namesakes.cli.ask(PAY, "say", {"text": "later"})
    assert namesakes.world.refusals("shared", aud=str(PAY)) == []


@refused_by(
    Layer.PERMISSIONS, "listening in on an agent with a similar name, or calling it", by=Adversary.AGENT
)
@pytest.mark.parametrize("other", ALIKE, ids=lambda one: one.path[1:])
async def test_the_broker_keeps_them_apart(namesakes, other):
    alike, caller = await namesakes.world.raw(other), await namesakes.world.raw(CLI)
    for subject in (
        call_subject(PAY, "work"),
        f"{agent_prefix(Family.CALL, PAY)}.*",
        f"{reply_inbox(PAY, TOKEN)}.*",
    ):
        said = await alike.denied(alike.client.subscribe(subject))
        assert f'"{subject.lower()}"' in said
    for raw, subject in ((caller, call_subject(other, "work")), (alike, call_subject(LEDGER, "say"))):
        said = await raw.denied(raw.client.publish(subject, b"x"))
        assert f'"{subject.lower()}"' in said


@refused_by(Step.AUTHORIZATION, "using the grants of an agent with a similar name", by=Adversary.AGENT)
@pytest.mark.parametrize("other", ALIKE, ids=lambda one: one.path[1:])
async def test_the_policy_keeps_them_apart(namesakes, other):
    world, ledger, ran = namesakes.world, namesakes.ledger, list(namesakes.ledger.ran)
    before = len(world.refusals("shared", aud=str(LEDGER)))
    for who in (other, PAY):
        call = forged_call(world.issue(who), iss=who, aud=LEDGER, cap="say", sub=call_subject(LEDGER, "say"))
        await namesakes.mallory.send(call.head.sub, call.frame, reply_of(call, who))
    await until(lambda: ledger.ran == [*ran, "say"], "the honest call")
    refusal = await world.refusal("shared", after=before, aud=str(LEDGER))
    assert (refusal["step"], refusal["step_name"]) == (Step.AUTHORIZATION.number, Step.AUTHORIZATION.label)
    assert refusal["caller"] == str(other)
    admissions = world.audit("shared", event="admission", aud=str(LEDGER))
    assert {one["caller"] for one in admissions} == {str(PAY)}
    with pytest.raises(AuthorizationError):
        await namesakes.cli.call(str(other), "work", {"text": "x"})


@refused_by(Layer.NAMES, "writing into the audit log of an agent that has the same name", by=Adversary.AGENT)
async def test_one_log_name_two_logs(namesakes):
    """Each keeps a chain, and a file, of its own, even where both are told the same destination."""
    world = namesakes.world
    for identity in (PAY, LEDGER):
        call = forged_call(
            world.issue(MALLORY), iss=MALLORY, aud=identity, cap="say", sub=call_subject(identity, "say")
        )
        await namesakes.mallory.send(call.head.sub, call.frame, reply_of(call, MALLORY))
        await world.refusal("shared", aud=str(identity), iss=str(MALLORY))
    files = sorted((world.folder / "audit").glob("shared.*.jsonl"))
    assert len(files) == 2
    received = [{record["aud"] for record in read(file) if "aud" in record} for file in files]
    assert {frozenset(one) for one in received} == {frozenset({str(PAY)}), frozenset({str(LEDGER)})}


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]
