"""The file of ``agentweave authz test``: questions to a policy, each with the answer that is expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from agentweave_bus.config.document import read_document
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["Case", "CaseTable", "read_cases"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Case(_Strict):
    """One question. ``reason`` is a text that the policy's reason must contain."""

    caller: str
    target: str
    action: str
    expect: Literal["allow", "deny"]
    name: str = ""
    payload: Any = Field(default_factory=dict)
    direction: Literal["inbound", "outbound"] = "inbound"
    kind: Literal["call", "task", "event", "control"] = "call"
    principal: dict[str, str] | None = None
    via: tuple[dict[str, Any], ...] = ()
    reason: str | None = None

    @field_validator("caller", "target")
    @classmethod
    def _is_an_id(cls, value: str) -> str:
        return str(SpiffeID(value))


class CaseTable(_Strict):
    """The whole file; ``policy`` is relative to it."""

    cases: tuple[Case, ...] = Field(min_length=1)
    policy: Path | None = None
    policy_path: str | None = None


def read_cases(path: Path) -> CaseTable:
    """Read a file of cases; one without a name is called by its number.

    Raises:
        ConfigurationError: it can't be read, or a case is wrong; the message says which and why.

    """
    try:
        table = CaseTable.model_validate(read_document(path).value)
    except ValidationError as error:
        raise ConfigurationError(f"{path}: {_problems(error)}") from error
    cases = tuple(
        case if case.name else case.model_copy(update={"name": f"case {number}"})
        for number, case in enumerate(table.cases, 1)
    )
    policy = None if table.policy is None else path.parent / table.policy
    return table.model_copy(update={"cases": cases, "policy": policy})


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in one['loc']) or 'the file'}: {one['msg']}" for one in error.errors()
    )
