"""Attack: a payload that the policy reads in one way and the handler in another.

The policy holds a limit on an amount; whoever makes it see a smaller one than the handler gets, gets the
difference. So there is one reading: the payload is decoded from the one form it has, validated, defaults
are filled in, and what comes out is what both get.
"""

from __future__ import annotations

import json
import math
import struct
from contextlib import contextmanager
from decimal import Decimal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from agentweave_bus import capability
from agentweave_bus.bus.admission import Step
from agentweave_bus.bus.subjects import call_subject
from agentweave_bus.envelope.codec import pack
from tests.integration.callee import replaced
from tests.integration.connections import heard_within
from tests.integration.probes import CLI, ECHO, Probe
from tests.security.catalogue import Adversary, refused_by
from tests.security.forging import forged_call, reply_of

pytestmark = pytest.mark.anyio

LIMITS = {"max_amount": 100, "max_fee": 10, "max_count": 3}
GRANTS = [
    {"caller": str(CLI), "callee": str(ECHO), "capabilities": ["work", "say"]},
    {"caller": str(CLI), "callee": str(ECHO), "capabilities": ["pay"], "limits": LIMITS},
    {"caller": str(CLI), "callee": str(ECHO), "capabilities": ["refund"], "limits": {"max_amount": 100}},
]


class Line(BaseModel):
    """It takes no notice of fields that it does not know, and is sent under other names than its own."""

    unit_price: Decimal = Field(alias="unitPrice")
    number: int = 1


class Open(BaseModel):
    """It keeps whatever else comes."""

    model_config = ConfigDict(extra="allow")
    unit_price: Decimal = Field(alias="unitPrice")


class Till(Probe):
    """Notes what its handlers really got."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.got = []

    @capability("pay")
    async def pay(  # noqa: PLR0917 - arguments of a payload have names
        self,
        amount: Decimal,
        fee: Decimal = Decimal("9.50"),
        count: int = 1,
        express: bool = False,
        lines: list[Line] = [],  # noqa: B006 - the product copies it for each call
        more: Open | None = None,
        note: str | None = None,
    ) -> dict:
        """Take money."""
        self.ran.append("pay")
        lines = [one.model_dump(by_alias=True) for one in lines]
        more = None if more is None else more.model_dump(by_alias=True)
        arguments = {"amount": amount, "fee": fee, "count": count, "express": express, "note": note}
        self.got.append({**arguments, "lines": lines, "more": more})
        return {}

    @capability("refund")
    async def refund(self, amount: Decimal = Decimal(500)) -> dict:
        """Give it back: all of it, when nobody says how much."""
        self.ran.append("refund")
        self.got.append({"amount": amount})
        return {}


@pytest.fixture(scope="module")
async def callee(session_world):
    grants = session_world.folder / "till.yaml"
    grants.write_text(yaml.safe_dump({"grants": GRANTS}))
    return await session_world.agent(ECHO, Till, authorization__bundle=str(grants))


async def send(attack, payload, name="pay"):
    """Send bytes, or what is packed to some, as a payload."""
    data = payload if isinstance(payload, bytes) else pack(payload)
    forged = forged_call(attack.world.issue(CLI), cap=name, sub=call_subject(ECHO, name), payload=data)
    inbox = await attack.mallory.listen(reply_of(forged))
    await attack.send(forged.frame, subject=forged.head.sub, reply=reply_of(forged))
    return inbox


class Ear:
    """Stands before the policy's engine and notes, word for word, what that is asked."""

    def __init__(self, engine):
        self.engine = engine
        self.asked = []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    async def evaluate(self, package, question):
        self.asked.append(json.loads(question, parse_float=Decimal)["context"]["payload"])
        return await self.engine.evaluate(package, question)


@contextmanager
def overheard(probe):
    authorizer = probe.parts.authorizer
    ear = Ear(authorizer._engine)
    with replaced(authorizer, "_engine", ear):
        yield ear


@pytest.mark.parametrize(
    "payload",
    [
        {"amount": "5"},
        {"amount": 5},
        {"amount": 5.25, "fee": "0.10", "count": 3, "express": True, "note": "x"},
        {"amount": "99.99999999999999999999999999", "count": 0},
        {"amount": "0005.50", "fee": "1e1"},
        {"amount": "5", "note": None, "lines": []},
        {"amount": "5", "lines": [{"unitPrice": "1.10", "discount": "100 %"}, {"unitPrice": 2, "number": 7}]},
        {"amount": "5", "more": {"unitPrice": "1.10", "colour": ["red", None, {"deep": 1}]}},
    ],
    ids=[
        "defaults",
        "a number",
        "all",
        "many digits",
        "odd digits",
        "nulls",
        "ignored fields",
        "kept fields",
    ],
)
async def test_policy_and_handler_get_the_same(attack, payload):
    """Honest payloads, in all the forms that are taken."""
    attack.echo.got.clear()
    with overheard(attack.echo) as ear:
        await heard_within(await send(attack, payload))
    record = await attack.admitted(ran="pay")
    assert ear.asked == attack.echo.got
    assert len(ear.asked) == 1
    written = record["input"]["context"]["payload"]
    assert written.keys() == ear.asked[0].keys()
    assert Decimal(str(written["fee"])) == attack.echo.got[0]["fee"]


@refused_by(Step.AUTHORIZATION, "a field left out whose default is beyond the limit", by=Adversary.CALLER)
async def test_a_field_left_out(attack):
    """A policy that saw no amount would find nothing to object to."""
    await send(attack, {}, "refund")
    await attack.refused(reason="the limit max_amount 100 and amount is 500")


def over(what, amount):
    mark = refused_by(Step.AUTHORIZATION, f"too large an amount as {what}", by=Adversary.CALLER)
    return pytest.param(amount, id=what, marks=mark)


@pytest.mark.parametrize(
    "amount",
    [
        over("a number", 101),
        over("a fraction", 100.01),
        over("text", "101"),
        over("text with an exponent", "1e3"),
        over("text in other digits", "\u0665\u0660\u0660"),
        over("text between spaces", " 500 "),
        over("text with a sign and zeros", "+000500.0"),
        over("text with underscores", "1_000"),
        over("the largest exponent", "1e38"),
        over("a digit beyond those of a float", "100.00000000000000000001"),
        over("the most digits", "9" * 38),
        over("an integer beyond those of a float", 2**64 - 1),
    ],
)
async def test_too_large_an_amount(attack, amount):
    await send(attack, {"amount": amount})
    await attack.refused(reason="the limit max_amount 100")


def unread(what, payload):
    mark = refused_by(Step.PAYLOAD, f"a payload with {what}", by=Adversary.CALLER)
    return pytest.param(payload, id=what, marks=mark)


def packed(*pairs):
    """A map of these pairs, keys more than once if they are given so."""
    return bytes([0x80 + len(pairs)]) + b"".join(pack(key) + value for key, value in pairs)


def float64(value):
    return b"\xcb" + struct.pack(">d", value)


SMALL, LARGE = ("amount", pack("1")), ("amount", pack("1000"))


@pytest.mark.parametrize(
    "payload",
    [
        unread("the amount twice, the small one first", packed(SMALL, LARGE)),
        unread("the amount twice, the small one last", packed(LARGE, SMALL)),
        unread("the amount once as bytes", packed(SMALL, (b"amount", pack("1000")))),
        unread("not a number", packed(("amount", float64(math.nan)))),
        unread("infinity", packed(("amount", float64(math.inf)))),
        unread("minus infinity", packed(("amount", float64(-math.inf)))),
        unread("a number that almost is none", packed(("amount", float64(5e-324)))),
        unread("the text NaN", {"amount": "NaN"}),
        unread("the text sNaN", {"amount": "sNaN"}),
        unread("the text Infinity", {"amount": "-Infinity"}),
        unread("too large an exponent", {"amount": "1e39"}),
        unread("an exponent of three hundred million digits", {"amount": "1e300000000"}),
        unread("an exponent below all", {"amount": "1e-999999999"}),
        unread("more digits than a number may have", {"amount": "1" + "0" * 39}),
        unread("a hundred thousand digits", {"amount": "0." + "1" * 100_000}),
        unread("such a number in a default's place", {"amount": "1", "fee": "1e-39"}),
        unread("a boolean as the amount", {"amount": True}),
        unread("a list as the amount", {"amount": ["1"]}),
        unread("null as the amount", {"amount": None}),
        unread("no amount", {"count": 1}),
        unread("null in a default's place", {"amount": "1", "fee": None}),
        unread("an integer as text", {"amount": "1", "count": "1"}),
        unread("an integer as a fraction", {"amount": "1", "count": 1.0}),
        unread("an integer as a boolean", {"amount": "1", "count": True}),
        unread("a boolean as a number", {"amount": "1", "express": 1}),
        unread("a boolean as text", {"amount": "1", "express": "true"}),
        unread("a text as a number", {"amount": "1", "note": 1}),
        unread("the amount in another case beside", {"amount": "1", "Amount": "1000"}),
        unread("the amount with a space beside", {"amount": "1", "amount ": "1000"}),
        unread("the amount in look-alike letters beside", {"amount": "1", "\u0430mount": "1000"}),
        unread("the amount behind a NUL beside", {"amount": "1", "amount\0": "1000"}),
        unread("an argument that nobody takes", {"amount": "1", "approved": True}),
        unread("the name that the code has for an argument", {"amount": "1", "a0": "1000"}),
        unread("the handler's own self", {"amount": "1", "self": None}),
        unread("a field of a model under its name in the code", {"amount": "1", "lines": [{"unit_price": "1"}]}),
        unread("a kept field that is another name of one", {"amount": "1", "more": {"unitPrice": "1", "unit_price": "9"}}),
        unread("arguments by their place", ["1"]),
        unread("a list of pairs", [["amount", "1"]]),
        unread("JSON in a text", '{"amount": "1"}'),
    ],
)  # fmt: skip
async def test_what_could_be_read_in_two_ways(attack, payload):
    await send(attack, payload)
    await attack.refused()


@refused_by(Step.PAYLOAD, "JSON in place of msgpack", by=Adversary.CALLER)
async def test_json_in_place_of_msgpack(attack):
    await send(attack, b'{"amount": "1"}')
    await attack.refused(reason="not readable")


@refused_by(Step.PAYLOAD, "numbers beyond all bounds where any JSON is taken", by=Adversary.CALLER)
async def test_numbers_where_any_json_is_taken(attack):
    """Readers differ over these: one rounds to zero or infinity, another counts three hundred digits."""
    numbers = [5e-324, 1e300, -1e39, 1.7976931348623157e308]
    for number in numbers:
        await send(attack, {"path": ["x"], "name": "say", "payload": {"x": [number]}}, "relay")
    await attack.refused_all(len(numbers), reason="the exponent of a number exceeds")
