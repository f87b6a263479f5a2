"""Attack: more than the origin's scope allows: it is dropped, widened, or not kept to."""

from __future__ import annotations

import pytest

from agentweave_bus.bus.admission import Step
from agentweave_bus.runtime.wiring import clock_ms
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, FRONT, MIDDLE
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, link_of, reply_of

pytestmark = pytest.mark.anyio

RELAY = f"{FRONT}#relay"


async def send(attack, given, kept):
    """The client asks front with the scope ``given``; front asks echo with ``kept``."""
    exp = clock_ms() + 20_000
    link = link_of(attack.world.issue(CLI), CLI, FRONT, scope=given, exp=exp)
    forged = forged_call(attack.world.issue(FRONT), iss=FRONT, via=(link,), scope=kept, exp=exp)
    inbox = await attack.mallory.listen(reply_of(forged, FRONT))
    await attack.send(forged.frame, reply=reply_of(forged, FRONT))
    return inbox


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ((RELAY, f"{ECHO}#work"), (f"{ECHO}#work",)),
        ((RELAY, f"{ECHO}#*"), (f"{ECHO}#*",)),
        ((RELAY, f"{ECHO}#*"), (f"{ECHO}#say", f"{ECHO}#work")),
        (None, (f"{ECHO}#work",)),
    ],
    ids=["the same", "any", "narrowed", "set by the middle"],
)
async def test_a_scope_that_is_kept_is_admitted_and_told_to_the_policy(attack, given, kept):
    """Honest; what the attacks below widen or drop is what makes them fail."""
    await heard_within(await send(attack, given, kept))
    record = await attack.admitted()
    context = record["input"]["context"]
    assert context["scope"] == list(kept)
    assert context["via"][0].get("scope") == (None if given is None else list(given))


def beyond(what, reason, given, kept):
    mark = refused_by(Step.DELEGATION, f"a scope {what}", by=Adversary.AGENT)
    return pytest.param(reason, given, kept, id=what, marks=mark)


@pytest.mark.parametrize(
    ("reason", "given", "kept"),
    [
        beyond("dropped on the way", "dropped the scope", (RELAY, f"{ECHO}#work"), None),
        beyond("that does not reach so far", "outside the scope", (RELAY, f"{ECHO}#say"), (f"{ECHO}#say",)),
        beyond(
            "widened by a capability", "widened the scope", (RELAY, f"{ECHO}#say"), (f"{ECHO}#say", f"{ECHO}#work")
        ),
        beyond("widened to every capability", "widened the scope", (RELAY, f"{ECHO}#work"), (f"{ECHO}#*",)),
        beyond(
            "widened by another agent", "widened the scope", (RELAY, f"{ECHO}#work"), (f"{ECHO}#work", f"{MIDDLE}#*")
        ),
        beyond("that its own request is outside of", "outside the scope", (f"{ECHO}#work",), (f"{ECHO}#work",)),
        beyond("of an agent whose name begins alike", "widened", (RELAY, f"{ECHO}o#*"), (f"{ECHO}#work",)),
        beyond("of another agent's capability of that name", "widened", (RELAY, f"{MIDDLE}#work"), (f"{ECHO}#work",)),
    ],
)  # fmt: skip
async def test_a_scope_that_is_not_kept(attack, reason, given, kept):
    await send(attack, given, kept)
    record = await attack.refused(reason=reason)
    assert "rule 6" in record["reason"]


@refused_by(Step.DELEGATION, "a scope that came back after it was dropped", by=Adversary.AGENT)
async def test_a_scope_that_came_back(attack):
    """Front drops it, middle sets the very same: what lay between was free to ask for anything."""
    scope = (RELAY, f"{MIDDLE}#relay", f"{ECHO}#say")
    exp = clock_ms() + 20_000
    first = link_of(attack.world.issue(CLI), CLI, FRONT, scope=scope, exp=exp)
    second = link_of(attack.world.issue(FRONT), FRONT, MIDDLE, via=(first,), exp=exp)
    forged = forged_call(attack.world.issue(MIDDLE), iss=MIDDLE, via=(first, second), scope=scope, exp=exp)
    await attack.send(forged.frame, reply=reply_of(forged, MIDDLE))
    await attack.refused(reason="rule 6")


@refused_by(Step.HEAD, "a scope that is none: patterns, empty or without a capability", by=Adversary.CALLER)
async def test_entries_that_are_none(attack):
    wrong = [
        [],
        ["*"],
        ["*#*"],
        [f"{ECHO}"],
        [f"{ECHO}#"],
        [f"{ECHO}#wor*"],
        ["spiffe://demo.test/*#work"],
        [""],
    ]
    svid = attack.world.issue(CLI)
    for scope in wrong:
        forged = forged_call(svid, raw={"scope": scope})
        await attack.send(forged.frame)
    await attack.refused_all(len(wrong), reason="the head's 'scope'")
