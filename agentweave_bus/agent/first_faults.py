"""Validating so that what is wrong with a large payload costs no more than its first faults.

A stranger's list of a hundred thousand wrong items would make several faults of each item, and a fault takes
a hundred times the space of what it is about. So containers in large payloads are read up to the first item
that doesn't fit.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic_core import SchemaValidator

__all__ = ["stopping_validator"]

_CONTAINERS: Final = ("list", "tuple", "set", "frozenset", "dict")
_NO_SCHEMAS: Final = frozenset({"metadata", "serialization", "default", "expected", "config"})


def stopping_validator(schema: Any) -> SchemaValidator:
    """Return a validator for a core schema of pydantic that leaves a container at its first wrong item.

    It takes what pydantic's own takes, and makes the same of it.
    """
    stopping = _stopping(schema)
    try:
        return SchemaValidator(stopping, None, _use_prebuilt=False)
    except TypeError:  # an older pydantic, which doesn't take models' validators as they were built before
        return SchemaValidator(stopping)


def _stopping(part: Any) -> Any:
    # Exact types: what derives from them is a value of the author's, such as a member of an enumeration.
    if type(part) in (list, tuple):
        return type(part)(_stopping(one) for one in part)
    if type(part) is not dict:
        return part
    copy = {key: value if key in _NO_SCHEMAS else _stopping(value) for key, value in part.items()}
    if part.get("type") in _CONTAINERS:
        copy["fail_fast"] = True
    return copy
