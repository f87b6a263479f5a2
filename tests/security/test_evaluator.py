"""Attack: a payload that the policy's evaluator can't read, breaks on or never ends with."""

from __future__ import annotations

from typing import Any

import pytest

from agentweave_bus import capability
from agentweave_bus.authz import authorizer
from agentweave_bus.authz.policy_input import PolicyInput
from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.exceptions import AuthorizationError
from tests.integration.probes import CLI, ECHO, PATIENCE, Probe
from tests.security.catalogue import Adversary, refused_by

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(find_opa() is None, reason="no opa binary: 'make tools' builds what compiles Rego"),
]

UNASKED = "the policy could not be asked"

POLICY = """
package probe.authz

import rego.v1

# All of it is said in the negative, so that a policy that saw no input would say yes.
default allow := false

allow if not closed

closed if input.context.payload.detail.forbidden

closed if input.context.payload.everything

closed if {
	input.action == "note"
	places := {name: place | some place, name in input.context.payload.detail.names}
	places.x == -1
}

closed if {
	some a in input.context.payload.detail.many
	some b in input.context.payload.detail.many
	some c in input.context.payload.detail.many
	a + b + c == -1
}

closed if sprintf("%x", [input.context.payload.detail.hexadecimal]) == ""

closed if count(numbers.range(1, input.context.payload.detail.upto)) == 0
"""


class Noting(Probe):
    """Its capabilities take what a policy and its evaluator might stumble over."""

    @capability("note", safe=True)
    async def note(self, detail: Any = None) -> dict[str, Any]:
        """Take anything."""
        self.ran.append("note")
        self.noted = detail
        return {"noted": True}

    @capability("erase")
    async def erase(self, everything: bool = True) -> dict[str, Any]:
        """Do what must be denied where the policy can't see that it wasn't asked for."""
        self.ran.append("erase")
        return {"erased": everything}


@pytest.fixture(scope="module")
async def cast(session_world, tmp_path_factory):
    world = session_world
    folder = tmp_path_factory.mktemp("policies")
    (folder / "own.rego").write_text(POLICY)
    settings = {"authorization__bundle": str(folder), "authorization__policy_path": "probe/authz"}
    echo, cli, mallory = (
        await world.agent(ECHO, Noting, **settings),
        await world.client(CLI),
        await world.raw(),
    )
    yield world, echo, cli, mallory, await mallory.listen(call_subject(ECHO, "work"))
    await world.clear()


async def denied(attack, name, payload):
    with pytest.raises(AuthorizationError) as denial:
        await attack.cli.call(str(ECHO), name, payload, timeout=PATIENCE)
    assert denial.value.direction == "inbound"
    return denial.value


async def noted(attack, detail):
    await attack.cli.ask(ECHO, "note", {"detail": detail})
    assert attack.echo.noted == detail
    attack.echo.ran.remove("note")


def nested(depth, inner):
    for _ in range(depth):
        inner = [inner]
    return inner


ODD = {
    "NUL in a text": "a\0b",
    "NUL in a key": {"a\0forbidden": False, "forbidden\0": False, "\0": 0},
    "an empty key": {"": ""},
    "what looks like an escape": "\\u0000\\",
    "quotes and brackets": '"}]}{[,:"',
    "line separators": "\u2028\u2029\x85\x0b\x7f\x1b[2J",
    "characters beyond 16 bits": "\U0001f600" * 50,
    "integers at the edge": [2**64 - 1, -(2**63), 2**53 + 1, 0],
    "fractions at the edge": [1e38, 1e-38, -1.5e-30, 0.1, 123456789.123456789],
    "deep nesting": nested(29, "x"),
    "many items": list(range(20_000)),
    "a long text": "x" * 300_000,
}


@refused_by(Step.AUTHORIZATION, "what is forbidden, hidden beside something odd", by=Adversary.CALLER)
@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
async def test_something_odd_beside_what_is_forbidden(attack, odd):
    await noted(attack, {"odd": odd})  # by itself it may be noted
    denial = await denied(attack, "note", {"detail": {"odd": odd, "forbidden": True}})
    assert denial.reason == "the policy does not allow it"
    await attack.refused(reason="the policy does not allow it")


@refused_by(Step.AUTHORIZATION, "null or nothing where a policy says `not`", by=Adversary.CALLER)
@pytest.mark.parametrize("value", [None, 0, "", [], {}], ids=repr)
async def test_null_and_empty_are_not_absent(attack, value):
    await noted(attack, {"forbidden": False})
    await noted(attack, None)
    await denied(attack, "note", {"detail": {"forbidden": value}})
    await attack.refused(reason="the policy does not allow it")


@refused_by(Step.AUTHORIZATION, "a field left out, which the handler would fill in", by=Adversary.CALLER)
async def test_an_argument_left_out(attack):
    await attack.cli.ask(ECHO, "erase", {"everything": False})
    attack.echo.ran.remove("erase")
    await denied(attack, "erase", {})
    record = await attack.refused(reason="the policy does not allow it")
    assert record["input"]["context"]["payload"] == {"everything": True}


@refused_by(Step.AUTHORIZATION, "an input that the evaluator can't parse", by=Adversary.CALLER)
@pytest.mark.parametrize(
    "text", [b"", b" ", b'{"caller_spiffe_id": ', b'{"a":1', b'{"a":x}', b"\xff"], ids=repr
)
async def test_what_only_the_evaluator_refuses_is_no_empty_input(attack, text, monkeypatch):
    """No payload is known that passes the strict writer and not OPA's parser; the second net must hold."""
    with monkeypatch.context() as patch:
        patch.setattr(authorizer, "write_input", lambda _value: bytes.__new__(PolicyInput, text))
        denial = await denied(attack, "say", {"text": "x"})
    assert denial.reason == UNASKED
    await attack.refused(reason="OPA's parser refuses the input")


@refused_by(Step.AUTHORIZATION, "a payload on which the evaluator breaks or runs on", by=Adversary.CALLER)
@pytest.mark.parametrize(
    ("detail", "reason"),
    [
        ({"names": ["x", "x"]}, "conflict"),
        ({"many": list(range(2_000))}, "fuel"),
        ({"hexadecimal": 255}, "sprintf"),
        ({"upto": 10**9}, "fuel"),
    ],
    ids=[
        "two values for one key",
        "a loop of loops",
        "a built-in that is not offered",
        "a range without end",
    ],
)
async def test_what_breaks_the_evaluator(attack, detail, reason):
    sandboxes = attack.echo.parts.authorizer._engine._sandboxes
    await noted(attack, {"names": ["x", "y"], "many": [1]})
    broken = sandboxes.instance
    denial = await denied(attack, "note", {"detail": detail})
    assert denial.reason == UNASKED
    assert sandboxes.instance is None  # thrown away
    record = await attack.refused(reason="the policy gave no answer")  # and an honest call passes
    assert reason in record["reason"]
    assert sandboxes.instance is not None
    assert sandboxes.instance is not broken
