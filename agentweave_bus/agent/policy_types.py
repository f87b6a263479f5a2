"""Types of which a policy can't see exactly what a handler gets; they are refused when a handler is read.

A policy judges the JSON form of the validated arguments. That is sound only while the form shows what the
handler acts on: reading it must not use a value up, nothing may be masked or missing, and no two things
may go by one name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from pydantic import AliasChoices, AliasPath, BaseModel, Secret, SecretBytes, SecretStr
from pydantic.fields import FieldInfo

__all__ = ["SECRET_TYPES", "FieldNames", "Hidden", "hidden_from_policy", "names_of"]

SECRET_TYPES: Final = (Secret, SecretStr, SecretBytes)
"""Types of pydantic whose output is a row of stars."""

_OPAQUE: Final = frozenset({"metadata", "serialization", "default", "config"})
"""Parts of a core schema that describe no further input."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """Why a policy could not see a value, and what to write instead."""

    reason: str
    way_out: str


@dataclass(frozen=True, slots=True)
class FieldNames:
    """The names of a model's fields.

    Attributes:
        shown: for each field the name by which a policy sees it: the alias under which callers send it,
            else the field's own.
        reserved: every name by which a field is known in code or may be sent.
        clash: a sentence about a name that stands for two fields; empty where there is none.

    """

    shown: Mapping[str, str]
    reserved: frozenset[str]
    clash: str


@lru_cache(maxsize=1024)
def names_of(model: type[BaseModel]) -> FieldNames:
    """Return the names of the fields of ``model``, which must be complete."""
    fields = model.model_fields
    shown = {name: _shown(name, info) for name, info in fields.items()}
    known = {name: {name, *_sent(info)} for name, info in fields.items()}
    clashes = (
        f"in {model.__name__}, {shown[one]!r} stands for {one!r} and for {other!r}"
        for one in fields
        for other in fields
        if one != other and shown[one] in known[other]
    )
    return FieldNames(shown, frozenset().union(*known.values()), next(clashes, ""))


def hidden_from_policy(schema: Any) -> Hidden | None:
    """Return why a value of this type (a core schema of pydantic) is not wholly visible; None if it is."""
    return next((found for part in _parts(schema) if (found := _hidden(part)) is not None), None)


def _parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Walk all parts of a core schema. It is a finite tree: what refers to itself does so by name."""
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            yield part
            pending += [value for key, value in part.items() if key not in _OPAQUE]
        elif isinstance(part, (list, tuple)):
            pending += part


def _hidden(part: Mapping[str, Any]) -> Hidden | None:
    if part.get("type") == "generator":
        return Hidden("an Iterable is read once, and the policy would be the one to read it", "Use list[…].")
    if _is_secret(part):
        return Hidden(
            "a secret shows itself as stars",
            "Use str or bytes, and name the field in authorization.audit.redact to keep it out of the log.",
        )
    if part.get("init_only"):
        return Hidden(f"{part.get('name')!r} is an InitVar, which is not kept", "Make it an ordinary field.")
    if part.get("type") == "dataclass" and _takes_more(part):
        name = part["cls"].__name__
        return Hidden(f"dataclass {name} keeps arguments that are no fields", "Use a pydantic model for it.")
    if part.get("type") == "model" and (clash := names_of(part["cls"]).clash):
        return Hidden(clash, "Give every field names of its own.")
    return None


def _is_secret(part: Mapping[str, Any]) -> bool:
    # Secret[…] makes its validators anew for each type, so those are known by where they were written.
    function = part.get("function")
    made_by = function.get("function") if isinstance(function, dict) else None
    if isinstance(made_by, type):
        return issubclass(made_by, SECRET_TYPES)
    return str(getattr(made_by, "__qualname__", "")).startswith("Secret.__get_pydantic_core_schema__")


def _takes_more(part: Mapping[str, Any]) -> bool:
    return bool(part.get("config", {}).get("extra_fields_behavior") == "allow")


def _shown(name: str, info: FieldInfo) -> str:
    alias = info.validation_alias
    if alias is None:
        return info.alias or name
    return alias if isinstance(alias, str) else name


def _sent(info: FieldInfo) -> Iterator[str]:
    alias = info.validation_alias or info.alias
    for choice in alias.choices if isinstance(alias, AliasChoices) else (alias,):
        first = choice.path[0] if isinstance(choice, AliasPath) else choice
        if isinstance(first, str):
            yield first
