"""The types of single settings, and the rules that depend on the environment.

A rule reads the environment from the validation context, so that it is reported with the key it
belongs to, beside every other problem of the file. Without a context the environment is production.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationInfo,
)

from agentweave_bus.names import CAPABILITY_NAME
from agentweave_bus.spiffe_id import SpiffeID, check_trust_domain

__all__ = [
    "CapabilityName",
    "ConfigModel",
    "Count",
    "Environment",
    "FilePath",
    "Flag",
    "HandlerPath",
    "Name",
    "Port",
    "Seconds",
    "SpiffeIdText",
    "TrustDomain",
    "as_module",
    "environment_of",
    "is_name",
]

Environment = Literal["production", "development"]

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HANDLER: Final = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_FILE: Final = re.compile(r"((?:[A-Za-z_]\w*/)*[A-Za-z_]\w*)\.py:([A-Za-z_]\w*)")


class ConfigModel(BaseModel):
    """What every section shares: immutable, unknown keys refused, instances checked again.

    Instances are validated again where they are put into another model, so that a section made for
    development can't be carried into a production configuration.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=False,
        revalidate_instances="always",
        allow_inf_nan=False,
        str_max_length=4096,
    )


def environment_of(info: ValidationInfo) -> Environment:
    """Return the environment that is being validated for; production unless the context says other."""
    context = info.context
    if isinstance(context, dict) and context.get("environment") == "development":
        return "development"
    return "production"


def is_name(value: object) -> bool:
    """Tell whether ``value`` can be an agent's or client's name."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None and value not in {".", ".."}


def _name(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"{text!r} may hold 1 to 64 letters, digits, '.', '-' and '_' only")
    return text


def _capability_name(text: str) -> str:
    if not CAPABILITY_NAME.fullmatch(text):
        raise ValueError(f"{text!r} may hold 1 to 64 of a-z, 0-9, '_' and '-' only, a letter or digit first")
    return text


def as_module(text: str) -> str:
    """Return ``folder/file.py:Class`` as ``folder.file:Class``, which it means; any other text as it is."""
    found = _FILE.fullmatch(text)
    return text if found is None else f"{found[1].replace('/', '.')}:{found[2]}"


def _handler_path(text: str) -> str:
    path = as_module(text)
    if not _HANDLER.fullmatch(path):
        raise ValueError(f"{text!r} must be written as module:Class, or as folder/file.py:Class")
    return path


def _spiffe_id(value: Any) -> SpiffeID:
    if not isinstance(value, str):
        raise ValueError("must be a SPIFFE ID, such as spiffe://example.org/agent/billing")  # noqa: TRY004 -- pydantic reports a ValueError
    return SpiffeID(value)


Name = Annotated[str, AfterValidator(_name)]
CapabilityName = Annotated[str, AfterValidator(_capability_name)]
HandlerPath = Annotated[str, AfterValidator(_handler_path)]
TrustDomain = Annotated[str, AfterValidator(check_trust_domain)]
SpiffeIdText = Annotated[SpiffeID, PlainValidator(_spiffe_id), PlainSerializer(str, return_type=str)]
FilePath = Annotated[Path, Field(strict=False)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
Port = Annotated[int, Field(strict=True, ge=0, le=65535)]
Seconds = Annotated[float, Field(strict=True, gt=0, le=86_400)]
