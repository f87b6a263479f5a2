"""The embedded engine and a real OPA server answer alike, over a table and over generated inputs.

Where the embedded engine gives no answer (a use of a built-in that it does not offer), that is a denial,
and the only difference there may be: it never answers what OPA would not.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentweave_bus.authz.engine import PolicyAnswer
from agentweave_bus.authz.opa import OpaServerEngine, OpaSettings
from agentweave_bus.authz.policy_bundle import build_bundle
from agentweave_bus.authz.policy_input import MAX_NESTING, parse_strict, write_input
from agentweave_bus.authz.policy_source import find_opa
from agentweave_bus.authz.wasm import EmbeddedEngine
from agentweave_bus.exceptions import PayloadError, PolicyUnavailableError
from tests.opa_socket import wait_until_healthy

pytestmark = pytest.mark.skipif(
    find_opa() is None, reason="no opa binary: 'make tools' builds the other engine"
)

ORDER = "spiffe://agentweave.io/agent/order"
PAYMENT = "spiffe://agentweave.io/agent/payment"

GRANTS = f"""
grants:
  - {{caller: {ORDER}, callee: {PAYMENT}, capabilities: [process_payment], limits: {{max_amount: 1000, min_amount: -7.5}}}}
  - {{caller: 'spiffe://agentweave.io/client/*', callee: {ORDER}, capabilities: ['*'], principals: ['https://login.example']}}
  - {{caller: spiffe://other.example/agent/a, callee: {PAYMENT}, capabilities: [process_payment]}}
partners: {{other.example: {{max_transaction: 99.5}}}}
operators: [{{who: spiffe://agentweave.io/client/cli, may: [control:cancel]}}]
"""

PROBE = """
package probe
import rego.v1
import data.agentweave.numbers

x := input.context.payload.x
y := input.context.payload.y

seen["equal"] := x == y
seen["less"] := x < y
seen["at_most"] := x <= y
seen["unequal"] := x != y
seen["same_in_a_set"] := x in {y}
seen["set_of_both"] := count({x, y})
seen["keyed"] := {x: 1}[y]
seen["sorted"] := sort([x, y])
seen["largest"] := max([x, y])
seen["type"] := type_name(x)
seen["count"] := count(x)
seen["plain"] := numbers.plain(x)
seen["plain_order"] := numbers.plain(x) <= numbers.plain(y)
seen["lower"] := lower(x)
seen["starts"] := startswith(x, y)
seen["ends"] := endswith(x, y)
seen["contains"] := contains(x, y)
seen["joined"] := concat("|", [x, y])
seen["split"] := split(x, y)
seen["trimmed"] := trim(x, y)
seen["prefix"] := trim_prefix(x, y)
seen["negated"] := true if not x
seen["missing"] := true if not input.context.payload.z
seen["has_x"] := "x" in object.keys(input.context.payload)
seen["walked"] := count([path | walk(x, [path, _])])
seen["echo"] := x

decision := {"allow": false, "seen": seen}
"""

FORMATS = """
package formats
import rego.v1

decision := {"allow": false, "text": sprintf(input.context.payload.template, input.context.payload.values)}
"""

TIMES = """
package times
import rego.v1

seen["clock"] := time.clock(input.context.payload.x)
seen["weekday"] := time.weekday(input.context.payload.x)
decision := {"allow": false, "seen": seen}
"""


@dataclass
class Pair:
    """Both engines over the same directory."""

    embedded: EmbeddedEngine
    server: OpaServerEngine
    runner: asyncio.Runner

    def ask_server(self, package: str, question: bytes) -> PolicyAnswer | None:
        try:
            return self.runner.run(self.server.evaluate(package, question))
        except PolicyUnavailableError:
            return None

    def ask_embedded(self, package: str, question: bytes) -> PolicyAnswer | None:
        try:
            return self.embedded.evaluate_now(package, question)
        except PolicyUnavailableError:
            return None


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    folder = Path(tempfile.mkdtemp(prefix="awagree-"))
    policies = folder / "policies"
    policies.mkdir()
    (policies / "grants.yaml").write_text(GRANTS)
    for name, text in {"probe": PROBE, "formats": FORMATS, "times": TIMES}.items():
        (policies / f"{name}.rego").write_text(text)
    (folder / "bundle.tar.gz").write_bytes(build_bundle(policies))
    socket = folder / "opa.sock"
    command = [str(find_opa()), "run", "--server", "--addr", f"unix://{socket}", "--log-level", "error"]
    process = subprocess.Popen([*command, "--skip-version-check", "-b", str(folder / "bundle.tar.gz")])
    try:
        wait_until_healthy(socket, process)
        with asyncio.Runner() as runner:
            server = OpaServerEngine([f"unix://{socket}"], OpaSettings(budget_ms=5000))
            yield Pair(EmbeddedEngine.from_directory(policies, cache=folder / "cache"), server, runner)
            runner.run(server.aclose())
    finally:
        process.kill()
        process.wait(10)
        shutil.rmtree(folder)


def request(payload: Any, **change: Any) -> dict[str, Any]:
    context = {"kind": "call", "transport": "bus", "via": [], "payload": payload} | change.pop("context", {})
    base = {
        "caller_spiffe_id": ORDER,
        "callee_spiffe_id": PAYMENT,
        "action": "process_payment",
        "direction": "inbound",
    }
    return base | change | {"context": context}


def assert_agree(pair: Pair, package: str, value: Any) -> PolicyAnswer:
    question = write_input(value)
    theirs, ours = pair.ask_server(package, question), pair.ask_embedded(package, question)
    assert theirs is not None
    assert ours is not None
    assert (ours.defined, ours.rule) == (theirs.defined, theirs.rule)
    assert ours.result == theirs.result
    return ours


# --- a table -------------------------------------------------------------------------------------------

AMOUNTS: list[tuple[Any, bool]] = [
    (1000, True),
    (1001, False),
    (-7, True),
    (-8, False),
    (Decimal("1000.00"), True),
    (Decimal("1000.000000000000000000000000000000001"), False),
    (Decimal("-7.50"), True),
    (Decimal("-7.5000000000000000000000000000000001"), False),
    (10**30, False),
    (2**64, False),
    (2**63 - 1, False),
    (-(2**64), False),
    (1e-300, True),
    (1e22, False),
    ("1000", True),
    ("1000.0", True),
    ("1001", False),
    ("-7.5", True),
    ("99999999999999999999999999", False),
    ("1000.000000000000000000000000000001", False),
    ("", False),
    (" 1", False),
    ("1 ", False),
    ("1e2", False),
    ("0x1", False),
    ("01", False),
    ("+1", False),
    ("1.", False),
    (".1", False),
    ("-", False),
    ("1\x00", False),
    ("\x001", False),
    ("NaN", False),
    ("Infinity", False),
    ("\u0661", False),
    ("1" * 65, False),
    (True, False),
    (None, False),
    ([], False),
    ([1], False),
    ({}, False),
]


@pytest.mark.parametrize(("amount", "allowed"), AMOUNTS, ids=repr)
def test_amounts_against_a_limit(pair: Pair, amount: Any, allowed: bool) -> None:
    assert assert_agree(pair, "agentweave/grants", request({"amount": amount})).result["allow"] is allowed


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        (
            {
                "caller_spiffe_id": "spiffe://agentweave.io/client/cli",
                "callee_spiffe_id": ORDER,
                "action": "anything",
            },
            True,
        ),
        (
            {
                "caller_spiffe_id": "spiffe://agentweave.io/client",
                "callee_spiffe_id": ORDER,
                "action": "anything",
            },
            False,
        ),
        ({"caller_spiffe_id": "spiffe://agentweave.io/client/cli", "action": "control:cancel"}, True),
        ({"caller_spiffe_id": "spiffe://agentweave.io/client/cli", "action": "control:drain"}, False),
        ({"caller_spiffe_id": "spiffe://other.example/agent/a"}, True),
        ({"caller_spiffe_id": "spiffe://other.example/agent/b"}, False),
        ({"caller_spiffe_id": None}, False),
        ({"caller_spiffe_id": ["spiffe://agentweave.io/agent/order"]}, False),
        ({"caller_spiffe_id": ORDER + "\x00"}, False),
        ({"context": {"principal": {"iss": "https://login.example"}}}, False),
        ({"context": {"kind": "event"}}, False),
    ],
)
def test_who_asks_whom(pair: Pair, change: dict[str, Any], allowed: bool) -> None:
    assert (
        assert_agree(pair, "agentweave/grants", request({"amount": 1}, **change)).result["allow"] is allowed
    )


@pytest.mark.parametrize(
    "package",
    [
        "order/authz",
        "user/authz",
        "payment/authz",
        "gateway/authz",
        "acme/authz",
        "partner/authz",
        "company/authz",
        "agentweave/authz",
        "nobody",
    ],
)
def test_the_other_packages(pair: Pair, package: str) -> None:
    question = write_input(request({"amount": 1, "billing_id": "b", "customer_id": "c"}))
    theirs, ours = pair.ask_server(package, question), pair.ask_embedded(package, question)
    if package == "nobody":
        assert ours is None
        assert theirs is not None
        assert not theirs.defined
    else:
        assert ours is not None
        assert theirs is not None
        assert (ours.rule, ours.result) == (theirs.rule, theirs.result)


# --- generated ---------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "",
        "\x00",
        "a\x00b",
        "\x7f",
        "\u2028",
        "\ud7ff",
        "\U0001f600",
        "0",
        "1",
        "1.0",
        "-0",
        "1e1",
        "10",
        "9",
        "NaN",
        "true",
        "null",
    ]
)
numbers = (
    st.integers(-20, 20)
    | st.integers(-(10**38), 10**38)
    | st.sampled_from([2**31, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**64 + 1])
    | st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**12), max_value=10**12)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | st.sampled_from([Decimal("1.0"), Decimal("1.00"), Decimal("0.1"), Decimal("0.10"), 0.1, 1.0, -0.0])
)
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
pairs = (
    st.tuples(values, values)
    | st.tuples(numbers, numbers)
    | st.tuples(texts, texts)
    | values.map(lambda value: (value, value))
)

generated = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@generated
@given(pairs)
def test_comparisons_texts_and_collections(pair: Pair, both: tuple[Any, Any]) -> None:
    assert_agree(pair, "probe", request({"x": both[0], "y": both[1]}))


@generated
@given(values)
def test_amounts_of_any_kind(pair: Pair, amount: Any) -> None:
    answer = assert_agree(pair, "agentweave/grants", request({"amount": amount}))
    if isinstance(amount, int | float | Decimal) and not isinstance(amount, bool):
        assert answer.result["allow"] is (Decimal("-7.5") <= Decimal(str(amount)) <= 1000)


@generated
@given(st.text(st.sampled_from("ab%%%sdvx0.-"), max_size=8), st.lists(scalars, max_size=3))
def test_sprintf_says_the_same_or_nothing(pair: Pair, template: str, arguments: list[Any]) -> None:
    question = write_input(request({"template": template, "values": arguments}))
    ours = pair.ask_embedded("formats", question)
    if ours is not None:
        theirs = pair.ask_server("formats", question)
        assert theirs is not None
        assert ours.result == theirs.result


@pytest.mark.parametrize(
    ("template", "arguments", "text"),
    [
        ("%s asks %s", ["a", "b"], "a asks b"),
        ("%d%%", [2**70], f"{2**70}%"),
        ("%v %v %v", [1.5, None, True], "1.5 null true"),
    ],
)
def test_sprintf_does_say_what_it_should(pair: Pair, template: str, arguments: list[Any], text: str) -> None:
    answer = assert_agree(pair, "formats", request({"template": template, "values": arguments}))
    assert answer.result["text"] == text


zones = st.sampled_from(
    ["", "UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Australia/Lord_Howe", "Nowhere/Else"]
)
instants = st.integers(0, 4_102_444_800).map(lambda seconds: seconds * 10**9) | st.sampled_from(
    [0, 1, 999_999_999, 1_774_746_000 * 10**9]
)


@generated
@given(instants | st.tuples(instants, zones).map(list))
def test_clock_and_weekday(pair: Pair, x: Any) -> None:
    assert_agree(pair, "times", request({"x": x}))


# --- what neither is asked ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd",
    [
        float("nan"),
        float("inf"),
        Decimal("NaN"),
        Decimal("-Infinity"),
        "\ud800",
        {1: 2},
        {1, 2},
        b"x",
        pytest.param(object(), id="an object"),
        Decimal("1E+401"),
        Decimal("1E-401"),
        10**401,
    ],
    ids=repr,
)
def test_what_is_no_bounded_json_is_refused_before_either(odd: Any) -> None:
    with pytest.raises(PayloadError):
        write_input(request({"amount": odd}))


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def test_depth_is_bounded_and_both_take_what_is_within(pair: Pair) -> None:
    assert_agree(pair, "probe", request({"x": nested(MAX_NESTING - 3), "y": nested(MAX_NESTING - 3)}))
    for depth in (MAX_NESTING - 2, 500, 5000, 200_000):
        with pytest.raises(PayloadError):
            write_input(
                request({"x": nested(depth)}) if depth < 1000 else request(None) | {"x": nested(depth)}
            )
        with pytest.raises(PayloadError):
            parse_strict(b"[" * (depth + 3) + b"]" * (depth + 3))


@given(values)
def test_what_is_written_reads_back_as_the_same_value(value: Any) -> None:
    assert parse_strict(write_input(value)) == as_numbers(value)


def as_numbers(value: Any) -> Any:
    if isinstance(value, float):
        return Decimal(repr(value))
    if isinstance(value, list):
        return [as_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: as_numbers(item) for key, item in value.items()}
    return value


@given(
    st.binary(max_size=40)
    | st.text(st.sampled_from('{}[]",:0123-+.eE\\u truefalsn'), max_size=40).map(str.encode)
)
def test_the_strict_parser_takes_no_more_than_json(raw: bytes) -> None:
    import json

    try:
        value = parse_strict(raw)
    except PayloadError:
        return
    assert json.loads(raw) == value or isinstance(value, Decimal | list | dict)
