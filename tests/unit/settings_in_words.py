"""What a setting's type is called in ``docs/configuration.md``: told from the models, by the same words."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from agentweave_bus.config import fields

NAMED = [
    (fields.SpiffeIdText, "SPIFFE ID"),
    (fields.TrustDomain, "trust domain"),
    (fields.Name, "name"),
    (fields.CapabilityName, "name"),
    (fields.HandlerPath, "`module:Class`"),
    (fields.FilePath, "path"),
    (fields.Port, "port"),
]
PLAIN = {str: "text", bool: "true or false", int: "whole number", float: "number", Path: "path"}


def type_words(model: type[BaseModel], name: str) -> str:
    """Return the type of a model's field, in the words of the page."""
    return words(get_type_hints(model, include_extras=True)[name])


def words(annotation: Any) -> str:  # noqa: PLR0911 - a case each
    for known, said in NAMED:
        if annotation == known:
            return said
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return words(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in arguments)
    if origin in {Union, types.UnionType}:
        return " or ".join(words(one) for one in arguments if one is not type(None))
    if origin is tuple:
        return f"list: {words(arguments[0])}"
    if origin is dict:
        return f"mapping: {words(arguments[0])} to {words(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return PLAIN[annotation]


def _bounds(metadata: tuple[Any, ...]) -> str:
    found: dict[str, Any] = {}
    for one in metadata:
        for part in one.metadata if isinstance(one, FieldInfo) else [one]:
            for key in ("ge", "gt", "le", "lt"):
                if isinstance(part, getattr(annotated_types, key.capitalize())):
                    found[key] = getattr(part, key)
    low = f"{found['ge']}" if "ge" in found else f"above {found['gt']}" if "gt" in found else ""
    high = f" to {found['le']}" if "le" in found else ""
    return f", {low}{high}" if low or high else ""
