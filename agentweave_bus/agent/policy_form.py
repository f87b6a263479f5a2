"""The JSON form in which a policy sees what a handler gets.

It is read from the validated values themselves, not through a model's serializers: a field that its
author excludes from output, or writes differently, is still an argument that the handler acts on.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from decimal import Decimal
from enum import Enum
from typing import Any

from pydantic import BaseModel, RootModel
from pydantic_core import PydanticSerializationError, to_jsonable_python

from agentweave_bus.agent.policy_types import SECRET_TYPES, names_of
from agentweave_bus.envelope.codec import to_json_value
from agentweave_bus.exceptions import PayloadError

__all__ = ["policy_form"]


def policy_form(value: Any) -> Any:
    """Return ``value`` as JSON, decimals kept as ``Decimal`` (within the bounds of a payload's numbers).

    Raises:
        PayloadError: it has no JSON form, a number exceeds its bounds, two things in it would go by one
            name, or reading it would change it or show less than it holds (iterators, secrets).

    """
    kind = type(value)
    if kind is str or kind is bool or value is None:  # most of what travels
        return value
    if kind is dict:
        return _mapping(value)
    if kind is list:
        return [policy_form(item) for item in value]
    if kind is int or kind is float:
        return to_json_value(value)
    return _converted(value)


def _converted(value: Any) -> Any:
    if isinstance(value, Enum):
        return policy_form(value.value)
    if isinstance(value, (str, int, float)):
        return to_json_value(value)
    if isinstance(value, Decimal):
        to_json_value(value)  # checks the bounds: eleven bytes can stand for 300 million digits
        return value
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return [policy_form(item) for item in value]
    return _structure(value)


def _structure(value: Any) -> Any:
    if isinstance(value, RootModel):
        return policy_form(value.root)
    if isinstance(value, BaseModel):
        return policy_form(_fields(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return policy_form({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, (Iterator, *SECRET_TYPES)):
        raise PayloadError(f"a {type(value).__name__} can't be shown without change")
    try:
        return to_json_value(value)
    except PayloadError:
        return _by_pydantic(value)


def _by_pydantic(value: Any) -> Any:
    """Write what pydantic can read and the codec does not know: bytes, timedelta, URLs, addresses."""
    try:
        return to_jsonable_python(value)
    except (PydanticSerializationError, UnicodeDecodeError) as error:
        raise PayloadError(f"a {type(value).__name__} has no JSON form") from error


def _fields(value: BaseModel) -> dict[str, Any]:
    """Return a model's fields as a policy knows them, with what else came where it takes more."""
    names = names_of(type(value))
    extra = value.model_extra or {}
    if taken := next((key for key in extra if key in names.reserved), None):
        raise PayloadError(
            f"{taken!r:.80} is another name of a field: give each field once, as the schema has it"
        )
    if names.clash:
        raise PayloadError(f"a {type(value).__name__} can't be shown: {names.clash}")
    return {**{shown: getattr(value, field) for field, shown in names.shown.items()}, **extra}


def _mapping(value: Mapping[Any, Any]) -> dict[str, Any]:
    form = {key if type(key) is str else _key(key): policy_form(item) for key, item in value.items()}
    if len(form) != len(value):
        raise PayloadError("two keys of one object have the same JSON form")
    return form


def _key(key: Any) -> str:
    form = policy_form(key)
    return form if isinstance(form, str) else str(form)
