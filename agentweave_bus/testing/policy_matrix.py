"""A policy held to a table: who may ask whom for what.

:func:`assert_policy_matrix` asks the real engine about every row, each by itself, and when a row is not as
expected shows the whole table: what was expected, what was decided, and why.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agentweave_bus.authz import AuthzContext, AuthzDecision
from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.testing.policies import LoadedPolicy, PolicySource, load_policy_source
from agentweave_bus.testing.trust import DEFAULT_TRUST_DOMAIN

__all__ = ["PolicyCase", "assert_policy_matrix"]

Expected = Literal["allow", "deny"]

_HEADINGS = ("", "caller", "callee", "capability", "payload", "expected", "decided", "reason")


@dataclass(frozen=True, slots=True)
class PolicyCase:
    """One row. ``caller`` and ``callee`` are SPIFFE IDs, or paths in the table's trust domain.

    ``principal`` and ``via`` (links as a policy sees them, origin first) say for whom the caller acts.
    """

    caller: str
    callee: str
    capability: str
    expect: Expected
    payload: Any = field(default_factory=dict)
    kind: str = "call"
    direction: Literal["inbound", "outbound"] = "inbound"
    principal: Mapping[str, str] | None = None
    via: tuple[Mapping[str, Any], ...] = ()


Row = PolicyCase | tuple[str, str, str, Expected] | tuple[str, str, str, Any, Expected]
"""A case, or as a tuple ``(caller, callee, capability, expected)``, with the payload before the last."""


def assert_policy_matrix(
    policy: PolicySource,
    table: Iterable[Row],
    *,
    policy_path: str | None = None,
    trust_domain: str = DEFAULT_TRUST_DOMAIN,
) -> None:
    """Ask ``policy`` about every row of ``table``.

    ``policy`` is a policy directory, a grants file, or grants as they would stand in one; ``policy_path`` is
    the package to ask, by default the shipped one that reads grants. It may be called from a test of either
    kind, plain or coroutine.

    Raises:
        AssertionError: a row is not as expected; the message is the whole table.
        AgentWeaveError: the policy can't be loaded, or a row is no row.

    """
    cases = [_case(row) for row in table]
    if not cases:
        raise AgentWeaveError("the table has no rows, so it would hold for any policy")
    loaded = load_policy_source(policy, policy_path)
    decisions = _decided(loaded, cases, trust_domain)
    wrong = sum(_differs(case, decision) for case, decision in zip(cases, decisions, strict=True))
    if wrong:
        table_text = _drawn([_HEADINGS, *map(_row, cases, decisions)])
        raise AssertionError(
            f"{wrong} of {len(cases)} decisions of {loaded.package} are not as expected:\n{table_text}"
        )


def _case(row: Row) -> PolicyCase:
    if isinstance(row, PolicyCase):
        return row
    match row:
        case (caller, callee, capability, "allow" | "deny" as expect):
            return PolicyCase(caller, callee, capability, expect)
        case (caller, callee, capability, payload, "allow" | "deny" as expect):
            return PolicyCase(caller, callee, capability, expect, payload)
    raise AgentWeaveError(
        f"{row!r:.200} is no row: write (caller, callee, capability, 'allow' or 'deny'), and a payload before"
        " the last"
    )


def _decided(loaded: LoadedPolicy, cases: Sequence[PolicyCase], trust_domain: str) -> list[AuthzDecision]:
    """Ask in a thread of its own, since the caller may or may not be on an event loop."""
    decisions: list[AuthzDecision] = []
    failures: list[BaseException] = []

    async def ask() -> None:
        decisions.extend(
            [await loaded.authorizer().authorize(_question(case, trust_domain)) for case in cases]
        )

    def run() -> None:
        try:
            asyncio.run(ask())
        except BaseException as error:  # noqa: BLE001 - raised again where it belongs
            failures.append(error)

    thread = threading.Thread(target=run, name="policy matrix")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return decisions


def _question(case: PolicyCase, trust_domain: str) -> AuthzContext:
    return AuthzContext(
        caller=_id(case.caller, trust_domain),
        callee=_id(case.callee, trust_domain),
        action=case.capability,
        direction=case.direction,
        payload=case.payload,
        kind=case.kind,
        transport="bus",
        via=list(case.via),
        principal=case.principal,
    )


def _id(text: str, trust_domain: str) -> SpiffeID:
    return SpiffeID(text) if text.startswith("spiffe://") else SpiffeID.of(trust_domain, *text.split("/"))


def _word(decision: AuthzDecision) -> Expected:
    return "allow" if decision.allowed else "deny"


def _differs(case: PolicyCase, decision: AuthzDecision) -> bool:
    return _word(decision) != case.expect


def _row(case: PolicyCase, decision: AuthzDecision) -> tuple[str, ...]:
    return (
        ">" if _differs(case, decision) else "",
        case.caller,
        case.callee,
        case.capability,
        json.dumps(case.payload, default=str),
        case.expect,
        _word(decision),
        decision.reason,
    )


def _drawn(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
