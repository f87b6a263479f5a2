"""The policy's form of each kind of value that a handler may get."""

from __future__ import annotations

import enum
import json
from collections import deque
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel, ConfigDict, Field, RootModel, Secret, SecretStr

from agentweave_bus.agent.policy_form import policy_form
from agentweave_bus.exceptions import PayloadError


class Level(enum.IntEnum):
    LOW = 1


@dataclass
class Point:
    x: int
    y: Decimal


class Tags(RootModel[list[str]]): ...


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (None, None),
        (True, True),
        (1.5, 1.5),
        (Level.LOW, 1),
        (Decimal("1.10"), Decimal("1.10")),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00+00:00"),
        (date(2026, 1, 2), "2026-01-02"),
        (timedelta(seconds=90), "PT1M30S"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Point(1, Decimal(2)), {"x": 1, "y": Decimal(2)}),
        (Tags(["a"]), ["a"]),
        ((1, {2}), [1, [2]]),
        ({Level.LOW: 1, UUID(int=1): 2}, {"1": 1, "00000000-0000-0000-0000-000000000001": 2}),
        (b"abc", "abc"),
        (Path("/a"), "/a"),
        (deque([Decimal("1.5")]), [Decimal("1.5")]),
    ],
)
def test_forms(value: Any, form: Any) -> None:
    assert policy_form(value) == form
    assert type(policy_form(value)) is type(form)
    json.dumps(policy_form(value), default=str)


class Renamed(BaseModel):
    model_config = ConfigDict(extra="allow")
    amount: int = Field(validation_alias="sum")


@pytest.mark.parametrize(
    "value",
    [
        Decimal("1E+40"),
        Decimal("NaN"),
        float("inf"),
        object(),
        [object()],
        SecretStr("hush"),
        Secret[int](1),
        {1: "a", "1": "b"},
        Renamed.model_validate({"sum": 5, "amount": 1}),
    ],
)
def test_what_has_no_bounded_form_is_refused(value: Any) -> None:
    with pytest.raises(PayloadError):
        policy_form(value)


def test_an_iterator_is_left_for_the_handler() -> None:
    items = iter([1, 2])
    with pytest.raises(PayloadError):
        policy_form(items)
    assert list(items) == [1, 2]
