"""What a policy says with ``require_approval``: whether a person has to approve first, who may, until when.

``true`` says only that somebody has to, and names nobody who could; so it comes to a denial. An object names
them: ``{"approvers": ["spiffe://acme.io/person/*"], "within": 3600}``. Anything else is no answer.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any, Final

from agentweave_bus.authz.decision import DEFAULT_WITHIN_S, ApprovalTerms
from agentweave_bus.exceptions import InvalidSpiffeIdError
from agentweave_bus.spiffe_id import SpiffeID

__all__ = ["MOST_APPROVERS", "read_require_approval"]

MOST_APPROVERS: Final = 32
_KEYS: Final = frozenset({"approvers", "within", "until"})
_LONGEST_S: Final = 31 * 86_400.0
_LATEST_MS: Final = 2**53 - 1


def read_require_approval(value: Any) -> tuple[bool, ApprovalTerms | None]:
    """Return whether a policy requires approval, and on which terms.

    Raises:
        ValueError: the value is neither a boolean nor such an object.

    """
    if isinstance(value, bool):
        return value, None
    if not isinstance(value, dict) or not value.keys() <= _KEYS:
        raise ValueError("require_approval is neither true or false nor {approvers, within, until}")
    within, until = value.get("within", DEFAULT_WITHIN_S), value.get("until")
    return True, ApprovalTerms(_approvers(value.get("approvers")), _seconds(within), _moment(until))


def _approvers(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MOST_APPROVERS:
        raise ValueError(f"approvers is no list of 1 to {MOST_APPROVERS} SPIFFE IDs or prefixes")
    for one in value:
        if not isinstance(one, str):
            raise ValueError("an approver is no text")  # noqa: TRY004 - it is data, not a mistake in a program
        try:
            SpiffeID(one.removesuffix("/*"))
        except InvalidSpiffeIdError as error:
            raise ValueError(str(error)) from error
    return tuple(value)


def _seconds(value: Any) -> float:
    seconds = _number(value)
    if not 0 < seconds <= _LONGEST_S:
        raise ValueError("within is no number of seconds above 0 and up to 31 days")
    return seconds


def _moment(value: Any) -> int | None:
    if value is None:
        return None
    moment = _number(value)
    if not 0 <= moment <= _LATEST_MS:
        raise ValueError("until is no time in milliseconds since the epoch")
    return int(moment)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not math.isfinite(value):
        raise ValueError("this is no number")
    return float(value)
