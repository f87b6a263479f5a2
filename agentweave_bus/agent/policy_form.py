"""The JSON form in which a policy sees what a handler gets.

It is read from the validated values themselves, not through a model's serializers: a field that its
author excludes from output, or writes differently, is still an argument that the handler acts on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from decimal import Decimal
from enum import Enum
from typing import Any

from pydantic import BaseModel, RootModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError, to_jsonable_python

from agentweave_bus.envelope.codec import to_json_value
from agentweave_bus.exceptions import PayloadError

__all__ = ["policy_form"]


def policy_form(value: Any) -> Any:
    """Return ``value`` as JSON, decimals kept as ``Decimal`` (within the bounds of a payload's numbers).

    Raises:
        PayloadError: it has no JSON form, or a number exceeds its bounds.

    """
    kind = type(value)
    if kind is str or kind is bool or value is None:  # most of what travels
        return value
    if kind is dict:
        return {key if type(key) is str else _key(key): policy_form(item) for key, item in value.items()}
    if kind is list:
        return [policy_form(item) for item in value]
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
        return {_key(key): policy_form(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [policy_form(item) for item in value]
    return _structure(value)


def _structure(value: Any) -> Any:
    if isinstance(value, RootModel):
        return policy_form(value.root)
    if isinstance(value, BaseModel):
        fields = {
            _wire_name(key, info): getattr(value, key) for key, info in type(value).model_fields.items()
        }
        return policy_form({**fields, **(value.model_extra or {})})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return policy_form({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
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


def _wire_name(name: str, info: FieldInfo) -> str:
    alias = info.validation_alias
    return alias if isinstance(alias, str) else info.alias or name


def _key(key: Any) -> str:
    form = policy_form(key)
    return form if isinstance(form, str) else str(form)
