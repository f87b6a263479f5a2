"""Payloads against annotations: strict as JSON is, explained, and the same for the policy."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Generator, Iterable
from dataclasses import InitVar, dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    Secret,
    SecretBytes,
    SecretStr,
    field_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import TypedDict

from agentweave_bus.agent.arguments import Arguments
from agentweave_bus.exceptions import ConfigurationError, PayloadError


class Tier(enum.Enum):
    FREE = "free"
    PREMIUM = "premium"


class Item(BaseModel):
    sku: str
    quantity: int = 1
    price: Decimal


@dataclass
class Address:
    street: str
    number: int


class Options(TypedDict):
    gift: bool


def arguments(function: Callable[..., Any]) -> Arguments:
    return Arguments("probe", function)


def taken(annotation: Any, value: Any) -> Any:
    def probe(x): ...

    probe.__annotations__ = {"x": annotation}
    return arguments(probe).validate({"x": value}).arguments["x"]


ID = "0192d3c0-9a2b-7cc0-8000-000000000001"


@pytest.mark.parametrize(
    ("annotation", "value", "meant"),
    [
        (Decimal, "19.99", Decimal("19.99")),
        (Decimal, 19.99, Decimal("19.99")),
        (Decimal, 3, Decimal(3)),
        (datetime, "2026-01-02T03:04:05Z", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        (date, "2026-01-02", date(2026, 1, 2)),
        (UUID, ID, UUID(ID)),
        (Tier, "premium", Tier.PREMIUM),
        (Item, {"sku": "w", "price": "1.50"}, Item(sku="w", price=Decimal("1.50"))),
        (list[Item], [{"sku": "w", "price": 2}], [Item(sku="w", price=Decimal(2))]),
        (Address, {"street": "s", "number": 4}, Address("s", 4)),
        (Options, {"gift": True}, {"gift": True}),
        (int | None, None, None),
        (float, 3, 3.0),
        (bytes, "abc", b"abc"),
        (set[int], [1, 2], {1, 2}),
        (tuple[int, str], [1, "a"], (1, "a")),
        (Literal["a", "b"], "b", "b"),
        (Any, [1, {"a": None}], [1, {"a": None}]),
        (dict, {"a": 1}, {"a": 1}),
        (Annotated[int, Field(ge=1)], 1, 1),
    ],
)
def test_json_values_become_what_is_annotated(annotation: Any, value: Any, meant: Any) -> None:
    got = taken(annotation, value)
    assert got == meant
    assert type(got) is type(meant)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, "1"),
        (int, True),
        (int, 1.0),
        (int, 1.5),
        (int, None),
        (float, "1.5"),
        (float, True),
        (str, 1),
        (str, None),
        (str, True),
        (bool, 1),
        (bool, "true"),
        (Decimal, True),
        (Decimal, "NaN"),
        (Decimal, "Infinity"),
        (Decimal, "1E+999999999"),
        (Decimal, "1e-39"),
        (Decimal, "1" * 39),
        (datetime, 1700000000),
        (datetime, "yesterday"),
        (UUID, "nope"),
        (Tier, "gold"),
        (Tier, "FREE"),
        (Item, {"sku": "w"}),
        (Item, {"sku": 1, "price": "1"}),
        (Item, {"sku": "w", "price": "1", "quantity": "2"}),
        (list[int], [1, "2"]),
        (list[int], {"0": 1}),
        (dict, [1]),
        (dict[str, int], {"a": "1"}),
        (Address, {"street": "s", "number": "4"}),
        (Options, {"gift": 1}),
        (Options, {}),
        (Literal["a"], "b"),
        (Annotated[int, Field(ge=1)], 0),
    ],
)
def test_nothing_is_converted_silently(annotation: Any, value: Any) -> None:
    with pytest.raises(PayloadError):
        taken(annotation, value)


def create_order(user_id: str, items: list[Item], tier: Tier = Tier.FREE, note: str = None) -> None:  # noqa: RUF013
    ...


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"items": []}, "'user_id' is missing"),
        ({"user_id": "u", "item": []}, "'item' is no argument (did you mean 'items'?)"),
        (
            {"user_id": "u", "items": [], "zzz": 1},
            "'zzz' is no argument (it takes user_id, items, tier, note)",
        ),
        ({"user_id": "u", "items": [{"sku": "w"}]}, "'items[0].price' is missing"),
        ({"user_id": 1, "items": []}, "'user_id': Input should be a valid string"),
        (None, "the payload must be an object with the arguments, not null"),
        ([], "not an array"),
        ("x", "not a string"),
        (True, "not a boolean"),
        (1, "not a number"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(payload: Any, message: str) -> None:
    with pytest.raises(PayloadError) as caught:
        arguments(create_order).validate(payload)
    assert message in str(caught.value)
    assert str(caught.value).startswith("probe: ")


def test_every_problem_is_listed_but_not_endlessly() -> None:
    with pytest.raises(PayloadError) as caught:
        arguments(create_order).validate({f"unknown{i}": 1 for i in range(20)})
    assert "and 17 more" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_long_names_of_a_stranger_are_cut() -> None:
    with pytest.raises(PayloadError) as caught:
        arguments(create_order).validate({"x" * 10_000: 1, "items": [], "user_id": "u"})
    assert len(str(caught.value)) < 300


def test_names_of_a_stranger_are_compared_with_ones_own_only_as_far_as_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[tuple[str, int]] = []

    def compare(word: str, known: Any, n: int) -> list[str]:
        compared.append((word, len(known)))
        return []

    monkeypatch.setattr("difflib.get_close_matches", compare)
    with pytest.raises(PayloadError, match="and 99998 more"):
        arguments(create_order).validate({"x" * 65: 1} | {f"item{i}": 1 for i in range(100_000)})
    # The long one is not even looked at: indexing it alone takes time that grows with its length.
    assert compared == [(f"item{i}", 4) for i in range(4)]


def test_values_are_not_quoted_in_errors() -> None:
    with pytest.raises(PayloadError) as caught:
        arguments(create_order).validate({"user_id": ["secret-value"], "items": "secret-value"})
    assert "secret-value" not in str(caught.value)


def test_defaults_are_filled_in_for_the_policy() -> None:
    call = arguments(create_order).validate({"user_id": "u", "items": [{"sku": "w", "price": "1.50"}]})
    assert call.policy_payload == {
        "user_id": "u",
        "items": [{"sku": "w", "quantity": 1, "price": Decimal("1.50")}],
        "tier": "free",
        "note": None,
    }
    assert type(call.policy_payload["items"][0]["price"]) is Decimal
    assert set(call.arguments) == {"user_id", "items"}


def test_a_default_of_none_means_optional() -> None:
    call = arguments(create_order).validate({"user_id": "u", "items": [], "note": None})
    assert call.arguments["note"] is None
    with pytest.raises(PayloadError, match="'note'"):
        arguments(create_order).validate({"user_id": "u", "items": [], "note": 5})


def test_an_unannotated_parameter_takes_anything() -> None:
    def probe(x, y=2): ...

    assert arguments(probe).validate({"x": [1]}).policy_payload == {"x": [1], "y": 2}


def test_extra_arguments_go_to_keyword_parameters() -> None:
    def probe(x: int, **more: Any) -> None: ...

    call = arguments(probe).validate({"x": 1, "y": "z"})
    assert call.arguments == call.policy_payload == {"x": 1, "y": "z"}
    assert arguments(probe).schema["additionalProperties"] is True


def test_annotated_keyword_parameters_are_checked() -> None:
    def probe(**more: int) -> None: ...

    assert arguments(probe).validate({"y": 1}).arguments == {"y": 1}
    with pytest.raises(PayloadError, match="'y'"):
        arguments(probe).validate({"y": "1"})


@pytest.mark.parametrize(
    "name", ["json", "copy", "schema", "model_config", "model_fields", "_x", "a0", "dict"]
)
def test_parameters_may_have_any_name(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def probe(first: int, {name}: int = 3): ...", namespace)
    made = arguments(namespace["probe"])
    assert made.validate({"first": 1, name: 2}).arguments == {"first": 1, name: 2}
    assert made.validate({"first": 1}).policy_payload == {"first": 1, name: 3}
    assert set(made.schema["properties"]) == {"first", name}


def test_a_single_parameter_called_data_is_an_ordinary_one() -> None:
    def process(data: dict) -> None: ...

    assert arguments(process).validate({"data": {"a": 1}}).arguments == {"data": {"a": 1}}
    with pytest.raises(PayloadError):
        arguments(process).validate({"a": 1})


def test_a_mutable_default_is_fresh_in_every_call() -> None:
    def probe(tags: list[str] = []) -> None: ...  # noqa: B006

    made = arguments(probe)
    made.validate({}).arguments["tags"].append("left behind")
    assert made.validate({}).arguments == {"tags": []}


def test_the_schema_follows_from_the_annotations() -> None:
    schema = arguments(create_order).schema
    assert schema["type"] == "object"
    assert schema["required"] == ["user_id", "items"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["tier"]["default"] == "free"
    assert schema["properties"]["note"]["default"] is None
    assert "default" not in schema["properties"]["user_id"]
    json.dumps(schema)


def test_a_decimal_default_stands_in_the_schema_as_text() -> None:
    def probe(limit: Decimal = Decimal("1.5")) -> None: ...

    assert arguments(probe).schema["properties"]["limit"]["default"] == "1.5"
    assert arguments(probe).validate({}).policy_payload == {"limit": Decimal("1.5")}


def test_an_unresolvable_annotation_names_the_function() -> None:
    def probe(x: Missing) -> None: ...  # noqa: F821

    with pytest.raises(ConfigurationError, match=r"probe: an annotation can't be resolved.*Missing"):
        arguments(probe)


def test_the_return_annotation_is_not_needed() -> None:
    def probe(x: int) -> Missing: ...  # noqa: F821

    assert arguments(probe).validate({"x": 1}).arguments == {"x": 1}


def test_a_type_that_json_can_not_say_names_the_function() -> None:
    class Socket: ...

    def probe(x): ...

    probe.__annotations__ = {"x": Socket}
    with pytest.raises(ConfigurationError, match="probe: its arguments can't be read from JSON"):
        arguments(probe)


def test_a_callable_parameter_names_the_function() -> None:
    def probe(x: Callable[[], int]) -> None: ...

    with pytest.raises(ConfigurationError, match="probe: its arguments can't be read from JSON"):
        arguments(probe)


@pytest.mark.parametrize("source", ["def probe(x, /): ...", "def probe(*x): ..."])
def test_parameters_that_have_no_name_are_refused(source: str) -> None:
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    with pytest.raises(ConfigurationError, match="can't be given by name"):
        arguments(namespace["probe"])


def test_a_field_as_default_is_explained() -> None:
    def probe(x: int = Field(default=1, ge=0)) -> None: ...

    with pytest.raises(ConfigurationError, match="Write Annotated"):
        arguments(probe)


def test_a_default_that_a_policy_can_not_see_is_refused() -> None:
    def probe(x: Any = object()) -> None: ...  # noqa: B008

    with pytest.raises(ConfigurationError, match="the default of 'x' has no JSON form"):
        arguments(probe)


class Fussy(BaseModel):
    x: int

    @field_validator("x")
    @classmethod
    def _broken(cls, value: int) -> int:
        raise KeyError("internal-detail")


def test_a_broken_validator_is_the_authors_secret(caplog: pytest.LogCaptureFixture) -> None:
    def probe(thing: Fussy) -> None: ...

    with pytest.raises(PayloadError, match=r"correlation id [0-9a-f]{16}") as caught:
        arguments(probe).validate({"thing": {"x": 1}})
    assert "internal-detail" not in str(caught.value)
    assert caplog.records[0].correlation_id in str(caught.value)
    assert "internal-detail" in caplog.text


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")
    user: str = Field(alias="userId")
    hidden: int = Field(default=7, exclude=True)


def test_the_policy_sees_what_a_model_would_leave_out() -> None:
    def probe(thing: Loose) -> None: ...

    call = arguments(probe).validate({"thing": {"userId": "u", "more": 1, "hidden": 8}})
    assert call.policy_payload == {"thing": {"userId": "u", "hidden": 8, "more": 1}}


@given(
    st.dictionaries(
        st.text(max_size=5), st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text()
    )
)
def test_any_json_reaches_handler_and_policy_alike(value: dict[str, Any]) -> None:
    def probe(data: dict) -> None: ...

    call = arguments(probe).validate({"data": value})
    assert call.arguments["data"] == value
    assert call.policy_payload == {"data": value}


class Several(BaseModel):
    model_config = ConfigDict(extra="allow", populate_by_name=True)
    amount: int = Field(0, validation_alias=AliasChoices("sum", "total"))
    note: str = Field("", alias="remark")
    first: int = Field(0, validation_alias=AliasPath("pair", 0))
    second: int = Field(0, validation_alias=AliasPath("pair", 1))


@pytest.mark.parametrize(
    "payload",
    [
        {"sum": 500_000, "amount": 1},
        {"amount": 500_000, "total": 1},
        {"sum": 1, "total": 500_000},
        {"remark": "a", "note": "b"},
    ],
)
def test_one_field_under_two_names_is_refused(payload: dict[str, Any]) -> None:
    def pay(order: Several) -> None: ...

    with pytest.raises(PayloadError, match="is another name of a field"):
        arguments(pay).validate({"order": payload})


@pytest.mark.parametrize("name", ["sum", "total"])
def test_a_field_with_several_names_is_seen_by_its_own(name: str) -> None:
    def pay(order: Several) -> None: ...

    call = arguments(pay).validate({"order": {name: 5, "pair": [1, 2], "more": 3}})
    assert call.arguments["order"].amount == 5
    seen = {"amount": 5, "remark": "", "first": 1, "second": 2, "more": 3}
    assert call.policy_payload["order"] == seen


def test_an_alias_that_is_not_read_gives_no_name() -> None:
    class Two(BaseModel):
        one: int = Field(0, validation_alias=AliasChoices("first", "uno"), alias="two")
        two: int = 0

    def probe(x): ...

    probe.__annotations__ = {"x": Two}
    call = arguments(probe).validate({"x": {"first": 500, "two": 1}})
    assert call.policy_payload == {"x": {"one": 500, "two": 1}}


class Swapped(BaseModel):
    a: int = Field(alias="b")
    b: int = Field(alias="a")


@dataclass
class Unkept:
    x: int
    y: InitVar[int]


@pydantic_dataclass(config=ConfigDict(extra="allow"))
class More:
    x: int = 0


class Nested(BaseModel):
    parts: list[tuple[str, SecretStr]] = []


class Tree(BaseModel):
    children: list[Tree] = []
    items: Iterable[int] = ()


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        (Iterable[int], "an Iterable is read once.*"),
        (Generator[int, None, None], "an Iterable is read once"),
        (dict[str, Iterable[int]] | None, "an Iterable is read once"),
        (Tree, "an Iterable is read once"),
        (SecretStr, "a secret shows itself as stars"),
        (SecretBytes, "a secret"),
        (Secret[int], "a secret"),
        (Nested, "a secret"),
        (Swapped, "in Swapped, 'b' stands for 'a' and for 'b'"),
        (Unkept, "'y' is an InitVar"),
        (More, "dataclass More keeps arguments that are no fields"),
    ],
)
@pytest.mark.parametrize("name", ["x", "more"])
def test_what_a_policy_could_not_see_is_refused_with_the_way_out(
    annotation: Any, reason: str, name: str
) -> None:
    def probe(x=None): ...

    def take(**more): ...

    function = probe if name == "x" else take
    function.__annotations__ = {name: annotation}
    shown = "x" if name == "x" else r"\*\*"
    with pytest.raises(
        ConfigurationError, match=rf"{function.__name__}: a policy can't see .* '{shown}'.*: {reason}"
    ) as caught:
        arguments(function)
    assert caught.value.hint


class Scalar(BaseModel):
    values: list[int | str | Decimal | bool]
    type: str = "list"
    default: dict[str, str] = {"type": "list"}
    inner: Scalar | None = None


def wide(items: list[int | str | Decimal | bool]) -> None: ...
def deep(order: Scalar) -> None: ...
def deeper(orders: dict[str, list[Scalar]]) -> None: ...
def others(**more: list[int | str | Decimal | bool]) -> None: ...


MANY = [None] * 50_000


@pytest.mark.parametrize(
    ("function", "payload", "place"),
    [
        (wide, {"items": MANY}, "items[0].int"),
        (wide, {"items": [*range(50_000), *MANY]}, "items[50000].int"),
        (deep, {"order": {"values": MANY}}, "order.values[0].int"),
        (deep, {"order": {"values": [1], "inner": {"values": MANY}}}, "order.inner.values[0].int"),
        (deeper, {"orders": {"a": [{"values": MANY}] * 2, "b": []}}, "orders.a[0].values[0].int"),
        (others, {"x": MANY, "y": MANY}, "x[0].int"),
    ],
    ids=["list", "late", "model", "recursive", "nested", "extra"],
)
def test_of_a_hundred_thousand_wrong_items_the_first_is_looked_for(
    function: Callable[..., Any], payload: Any, place: str
) -> None:
    with pytest.raises(PayloadError) as caught:
        arguments(function).validate(payload)
    assert f"{place!r}: Input should be a valid integer" in str(caught.value)
    assert str(caught.value).count(place.removesuffix("int")) == 4  # one for each type that it could be
    assert "more" not in str(caught.value)


def test_thousands_of_faults_are_counted_and_not_put_in_words() -> None:
    with pytest.raises(PayloadError) as caught:
        arguments(wide).validate({"items": [[]] * 5_000})
    assert str(caught.value) == "probe: more values than can be listed do not fit; and 19999 more"


def test_what_is_large_is_taken_as_what_is_small() -> None:
    def probe(
        scalars: list[Scalar], sizes: set[Tier], at: datetime, amount: Decimal, text: str = ""
    ) -> None: ...

    scalar = {"values": [1, "x", True, 1.5], "inner": {"values": [], "default": {}}}
    small = {"scalars": [scalar], "sizes": ["free"], "at": "2026-01-02T03:04:05Z", "amount": "1.10"}
    taken, as_large = (arguments(probe).validate(small | {"text": "x" * size}) for size in (1, 20_000))
    assert as_large.arguments | {"text": "x"} == taken.arguments
    assert as_large.policy_payload | {"text": "x"} == taken.policy_payload
    assert type(as_large.arguments["scalars"][0]) is Scalar
    for wrong in (
        {"amount": True},
        {"at": 5},
        {"scalars": [{"values": [1], "type": 1}]},
        {"sizes": ["none"]},
    ):
        with pytest.raises(PayloadError, match=next(iter(wrong))):
            arguments(probe).validate(small | {"text": "x" * 20_000} | wrong)


class Unfinished(BaseModel):
    x: Nowhere | None = None  # type: ignore[name-defined] # noqa: F821


def unfinished(m: Unfinished) -> None: ...
def unfinished_more(**more: Unfinished) -> None: ...


@pytest.mark.parametrize("function", [unfinished, unfinished_more])
def test_a_model_that_is_not_finished_is_said_to_be(function: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"can't be read from JSON: .* is not fully defined"):
        arguments(function)
