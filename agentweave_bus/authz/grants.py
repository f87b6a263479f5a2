"""``grants.yaml``: who may ask whom for what. Nothing else is allowed.

The file is data, not a program. The shipped Rego reads it (:meth:`Grants.to_policy_data` is what it
sees), the broker's permissions are generated from it (:meth:`Grants.callees_of`,
:meth:`Grants.callers_of`), and a cheap look at it precedes whatever costs something
(:meth:`Grants.find`). Whether a call is allowed is always the policy's word, never this module's:
limits on the payload, for instance, are not compared here.

Reading the text and naming the line of a mistake is :mod:`agentweave_bus.authz.grants_file`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    model_validator,
)

from agentweave_bus.authz.approval_terms import MOST_APPROVERS
from agentweave_bus.authz.grants_file import load_grants_document
from agentweave_bus.names import EVENT_PATTERN, covers_event
from agentweave_bus.spiffe_id import SpiffeID, check_trust_domain

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

__all__ = ["OPERATOR_ACTS", "Approval", "Grant", "Grants", "Operator", "Partner", "Reach", "pattern_matches"]

OPERATOR_ACTS: Final = tuple(
    f"control:{verb}"
    for verb in ("approve", "cancel", "drain", "observe", "redrive", "reject", "revoke", "watch")
)
"""The acts of operators that a policy decides on."""

_PAYLOAD_LIMIT: Final = re.compile(r"(max|min)_[A-Za-z_][A-Za-z0-9_]*")
_FIELD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LOCAL_LIMITS: Final = frozenset({"max_per_minute"})


def pattern_matches(pattern: str, text: str) -> bool:
    """Say whether ``pattern`` covers ``text``.

    A pattern is the exact text, or a prefix that ends in ``/*`` and covers everything below it at any
    depth (``spiffe://a.io/client/*`` covers ``spiffe://a.io/client/eu/cli``, not
    ``spiffe://a.io/client``), or ``*``.
    """
    if pattern.endswith("/*"):
        return text.startswith(pattern[:-1]) and len(text) >= len(pattern)
    return pattern in ("*", text)


def _domain_of(spiffe_id: str) -> str:
    return "/".join(spiffe_id.split("/", 3)[:3])


def _number(value: object) -> object:
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return value
    raise ValueError(f"{value!r} is no number (write it without quotes)")


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) else (value,)


def _spiffe_pattern(text: str) -> str:
    SpiffeID(text.removesuffix("/*"))
    return text


def _exact_id(text: str) -> str:
    if text.endswith("/*"):
        raise ValueError("a callee is named exactly; '/*' is for callers only")
    return str(SpiffeID(text))


def _capability(text: str) -> str:
    if not EVENT_PATTERN.fullmatch(text):
        raise ValueError(
            f"{text!r} is no capability: lower-case letters, digits, '_' and '-', at most 64, or '*'"
            " (for events parts of that kind, joined by dots, the last of which may be '*')"
        )
    return text


def _act(text: str) -> str:
    if text != "control:*" and text not in OPERATOR_ACTS:
        raise ValueError(f"{text!r} is no operator's act; known are {', '.join(OPERATOR_ACTS)}, control:*")
    return text


def _limits(value: dict[str, float]) -> dict[str, float]:
    for name, bound in value.items():
        if not _PAYLOAD_LIMIT.fullmatch(name):
            raise ValueError(f"{name!r} is no limit: write max_<field>, min_<field> or max_per_minute")
        if name in _LOCAL_LIMITS and (type(bound) is not int or bound < 1):
            raise ValueError(f"{name} counts uses: a whole number, 1 or more")
    return value


def _fields(value: dict[str, float]) -> dict[str, float]:
    for name in value:
        if not _FIELD.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a payload's field")
    return value


_Number = Annotated[float, PlainValidator(_number), PlainSerializer(lambda value: value)]
_Text = Annotated[str, Field(strict=True)]
_CallerPattern = Annotated[_Text, AfterValidator(_spiffe_pattern)]
_Callers = Annotated[tuple[_CallerPattern, ...], BeforeValidator(_listed), Field(min_length=1)]
_Callees = Annotated[
    tuple[Annotated[_Text, AfterValidator(_exact_id)], ...], BeforeValidator(_listed), Field(min_length=1)
]
_Capabilities = Annotated[
    tuple[Annotated[_Text, AfterValidator(_capability)], ...], BeforeValidator(_listed), Field(min_length=1)
]
_Acts = Annotated[
    tuple[Annotated[_Text, AfterValidator(_act)], ...], BeforeValidator(_listed), Field(min_length=1)
]
_Texts = Annotated[tuple[_Text, ...], BeforeValidator(_listed), Field(min_length=1)]
_Kinds = Annotated[
    tuple[Literal["call", "task", "event"], ...], BeforeValidator(_listed), Field(min_length=1)
]
_Limits = Annotated[dict[_Text, _Number], AfterValidator(_limits)]
_Above = Annotated[dict[_Text, _Number], AfterValidator(_fields)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def to_data(self) -> dict[str, Any]:
        """Return the entry as JSON: lists where a single text is allowed too, absent keys left out."""
        return self.model_dump(mode="json", exclude_none=True)


class Approval(_Entry):
    """When somebody has to approve of a task before it runs, and who may.

    Attributes:
        by: exact SPIFFE IDs, or prefixes ending in ``/*``. They need ``control:approve``, too.
        above: payload fields, and up to what each needs no approval; without any everything needs it.
        within: so many seconds from when it is asked for; then the task is rejected.

    """

    by: Annotated[_Callers, Field(max_length=MOST_APPROVERS)]
    above: _Above = Field(default_factory=dict)
    within: Annotated[int, Field(strict=True, ge=1, le=31 * 86_400)] = 86_400


class Grant(_Entry):
    """One entry of ``grants``: these callers may ask these callees for these capabilities.

    Attributes:
        caller: exact SPIFFE IDs, or prefixes ending in ``/*``.
        callee: exact SPIFFE IDs.
        capabilities: names, or ``*`` for all that the callee has (never operators' acts). Events have names
            with dots, and ``order.*`` covers all below ``order``, at any depth.
        kinds: of envelopes: ``call``, ``task``, ``event``.
        limits: ``max_<field>`` and ``min_<field>`` on payload fields, and ``max_per_minute`` uses of a
            capability by one caller in one process.
        principals: issuers (``prn.iss``) that the caller may name a principal of; ``*`` is any.
        on_behalf_of: who must have begun the delegation (``via[0].iss``); absent: anybody.
        approval: of whom a task needs the approval before it runs. A call that needs one is refused.

    """

    caller: _Callers
    callee: _Callees
    capabilities: _Capabilities
    kinds: _Kinds = ("call", "task")
    limits: _Limits = Field(default_factory=dict)
    principals: _Texts | None = None
    on_behalf_of: _Callers | None = None
    approval: Approval | None = None

    @model_validator(mode="after")
    def _limits_agree(self) -> Grant:
        for name, low in self.limits.items():
            high = self.limits.get("max_" + name[4:])
            if name.startswith("min_") and high is not None and low > high:
                raise ValueError(f"{name} is above max_{name[4:]}: nothing could ever pass")
        return self

    def matches(self, caller: str, callee: str, capability: str, kind: str) -> bool:
        """Say whether this grant is about such a request; limits, origin and principal apart.

        Who publishes an event asks for that the trust domain that it belongs to, whoever may receive it.
        """
        return (
            (callee in self.callee or (kind == "event" and callee == _domain_of(caller)))
            and kind in self.kinds
            and self.covers_capability(capability)
            and any(pattern_matches(pattern, caller) for pattern in self.caller)
        )

    def covers_capability(self, capability: str) -> bool:
        """Say whether ``capability`` is listed, or a pattern for it is. Operators' acts never are."""
        return ":" not in capability and any(covers_event(one, capability) for one in self.capabilities)

    def strangers(self, domain: str, identities: Collection[str]) -> Iterator[str]:
        """Yield a sentence for each of ``domain`` who is named and is none of its ``identities``."""
        head = f"spiffe://{domain}/"
        approvers = () if self.approval is None else self.approval.by
        for role, patterns in (("caller", self.caller), ("callee", self.callee), ("approver", approvers)):
            for pattern in patterns:
                if not pattern.startswith(head) or pattern.startswith(f"{head}agentweave/"):
                    continue
                if not any(pattern_matches(pattern, one) for one in identities):
                    close = get_close_matches(pattern, identities, n=1)
                    meant = f"; did you mean {close[0]}?" if close else ""
                    yield f"the {role} {pattern!r} is nobody here{meant}"

    def permits_origin(self, origin: str | None) -> bool:
        """Say whether a delegation begun by ``origin`` may use this grant; None is a call of one's own."""
        if self.on_behalf_of is None:
            return True
        return origin is not None and any(pattern_matches(item, origin) for item in self.on_behalf_of)

    def permits_principal(self, issuer: str | None) -> bool:
        """Say whether a principal of ``issuer`` may be named; None is no principal."""
        if issuer is None:
            return True
        return self.principals is not None and any(item in ("*", issuer) for item in self.principals)


class Partner(_Entry):
    """Limits for a foreign trust domain.

    Attributes:
        max_transaction: highest ``amount`` of one request.
        rate_limit_per_minute: requests a minute from the whole domain, in one process.
        daily_limit: sum of ``amount`` in one UTC day from the whole domain, in one process.

    """

    max_transaction: _Number | None = None
    rate_limit_per_minute: Annotated[int, Field(strict=True, ge=1)] | None = None
    daily_limit: _Number | None = None


class Operator(_Entry):
    """Who may do which operators' acts.

    Attributes:
        who: exact SPIFFE IDs, or prefixes ending in ``/*``.
        may: ``control:<verb>``, or ``control:*``.

    """

    who: _Callers
    may: _Acts

    def to_data(self) -> dict[str, Any]:
        """Return the entry as JSON, ``control:*`` written out."""
        acts = OPERATOR_ACTS if "control:*" in self.may else self.may
        return {"who": list(self.who), "may": list(acts)}


@dataclass(frozen=True, slots=True)
class Reach:
    """One thing that a grant lets somebody reach, or be reached by.

    Attributes:
        agent: the other side: an exact SPIFFE ID, or, for callers, a pattern.
        capabilities: names, ``*``, or, of events, ``order.*``.
        kinds: of envelopes.

    """

    agent: str
    capabilities: tuple[str, ...]
    kinds: tuple[str, ...]

    def scope_entries(self, caller: str) -> Iterator[str]:
        """Yield what a scope says so that ``caller`` may use this: ``<SPIFFE ID>#<name>``, or ``#*``.

        Events are asked of the caller's own trust domain, and a scope has no patterns of them but ``*``.
        """
        if self.kinds != ("event",):
            yield from (f"{self.agent}#{name}" for name in self.capabilities if not name.endswith(".*"))
        if "event" in self.kinds:
            domain = _domain_of(caller)
            yield from (f"{domain}#{'*' if name.endswith('*') else name}" for name in self.capabilities)


class Grants(BaseModel):
    """The whole file. ``Grants.load(path)`` reads one; ``Grants()`` allows nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    grants: tuple[Grant, ...] = ()
    partners: dict[Annotated[str, AfterValidator(check_trust_domain)], Partner] = Field(default_factory=dict)
    operators: tuple[Operator, ...] = ()

    @classmethod
    def load(cls, path: str | Path) -> Grants:
        """Read and check a file.

        Raises:
            ConfigurationError: it can't be read, is no YAML, or an entry is wrong; each mistake is named
                with its line, its place and, for unknown keys, the nearest known one.

        """
        return load_grants_document(cls, path)

    @classmethod
    def parse(cls, text: str, *, name: str = "grants.yaml") -> Grants:
        """Check ``text``; ``name`` is what messages call it. Raises like :meth:`load`."""
        return load_grants_document(cls, name, text=text)

    def find(self, caller: str, callee: str, capability: str, kind: str = "call") -> Grant | None:
        """Return the first grant about such a request, or None; limits, origin and principal apart."""
        return next(self.find_all(caller, callee, capability, kind), None)

    def find_all(self, caller: str, callee: str, capability: str, kind: str = "call") -> Iterator[Grant]:
        """Iterate over every grant about such a request."""
        return (grant for grant in self.grants if grant.matches(caller, callee, capability, kind))

    def permits(
        self,
        caller: str,
        callee: str,
        capability: str,
        kind: str = "call",
        *,
        origin: str | None = None,
        principal_issuer: str | None = None,
    ) -> bool:
        """Say whether some grant, or an operator's entry, is about such a request.

        Everything but the payload's limits is looked at: a True means that it depends on the payload
        alone, as far as the grants are concerned.
        """
        if ":" in capability:
            return self.operator_may(caller, capability)
        return any(
            grant.permits_origin(origin) and grant.permits_principal(principal_issuer)
            for grant in self.find_all(caller, callee, capability, kind)
        )

    def operator_may(self, who: str, act: str) -> bool:
        """Say whether ``who`` may do the operators' act ``act`` (``control:<verb>``)."""
        return any(
            (act in entry.may or "control:*" in entry.may)
            and any(pattern_matches(pattern, who) for pattern in entry.who)
            for entry in self.operators
            if act in OPERATOR_ACTS
        )

    def callees_of(self, caller: str) -> tuple[Reach, ...]:
        """Return what ``caller`` may reach, one entry per grant and callee."""
        return tuple(
            Reach(callee, grant.capabilities, grant.kinds)
            for grant in self.grants
            if any(pattern_matches(pattern, caller) for pattern in grant.caller)
            for callee in grant.callee
        )

    def approvals_by(self, approver: str) -> tuple[Grant, ...]:
        """Return the grants whose tasks ``approver`` may decide on, if it may ``control:approve``."""
        return tuple(
            grant
            for grant in self.grants
            if grant.approval is not None
            and any(pattern_matches(pattern, approver) for pattern in grant.approval.by)
        )

    def callers_of(self, callee: str) -> tuple[Reach, ...]:
        """Return who may reach ``callee``, one entry per grant and caller (which may be a pattern)."""
        return tuple(
            Reach(pattern, grant.capabilities, grant.kinds)
            for grant in self.grants
            if callee in grant.callee
            for pattern in grant.caller
        )

    def identities(self) -> frozenset[str]:
        """Return every SPIFFE ID that the file names exactly."""
        named = [item for grant in self.grants for item in (*grant.caller, *grant.callee)]
        named += [item for one in self.grants if one.approval is not None for item in one.approval.by]
        named += [item for entry in self.operators for item in entry.who]
        return frozenset(item for item in named if not item.endswith("/*"))

    def explain(self, caller: str, callee: str, capability: str, kind: str = "call") -> str:
        """Return the YAML of an entry which, added to the file, is about just such a request."""
        if ":" in capability:
            return _snippet("operators", {"who": caller, "may": [capability]})
        entry: dict[str, Any] = {"caller": caller, "callee": callee, "capabilities": [capability]}
        if kind not in ("call", "task"):
            entry["kinds"] = [kind]
        return _snippet("grants", entry)

    def warnings(self, capabilities: Mapping[str, Collection[str]] | None = None) -> tuple[str, ...]:
        """Return a sentence for each entry that can never match, adds nothing, or lets an agent call itself.

        ``capabilities`` says what callees are known to have, by SPIFFE ID; callees that it lacks are
        taken at the file's word.
        """
        known = capabilities or {}
        return (*self._warnings(), *self._unknown_capabilities(known))

    def to_policy_data(self) -> dict[str, Any]:
        """Return what Rego reads as ``data.grants``, ``data.operators`` and ``data.partner``."""
        limits = {domain: partner.to_data() for domain, partner in sorted(self.partners.items())}
        return {
            "grants": [grant.to_data() for grant in self.grants],
            "operators": [entry.to_data() for entry in self.operators],
            "partner": {"registered_domains": list(limits), "partner_limits": limits},
        }

    def _warnings(self) -> Iterator[str]:
        if not self.grants:
            yield "no grants: nobody may ask anybody for anything"
        for index, grant in enumerate(self.grants):
            place = f"grants[{index}]"
            if grant.approval is not None and "task" not in grant.kinds:
                yield f"{place}: approval is for tasks, and kinds does not list task: nobody is ever asked"
            for name in _never_matching(grant):
                yield f"{place}: {name!r} is an event's name, and kinds does not list event: it never matches"
            if grant in self.grants[:index]:
                yield f"{place} repeats grants[{self.grants.index(grant)}]"
            for pattern, callee in _covering_itself(grant):
                yield f"{place}: the caller {pattern!r} covers {callee} itself, which may then call itself"

    def _unknown_capabilities(self, known: Mapping[str, Collection[str]]) -> Iterator[str]:
        for index, grant in enumerate(self.grants):
            for callee in grant.callee:
                for name in () if callee not in known else grant.capabilities:
                    if name != "*" and "." not in name and name not in known[callee]:
                        close = get_close_matches(name, list(known[callee]), n=1)
                        hint = f"; did you mean {close[0]!r}?" if close else ""
                        yield f"grants[{index}]: {callee} has no capability {name!r}{hint}"


def _covering_itself(grant: Grant) -> Iterator[tuple[str, str]]:
    """Find callees that a caller's pattern includes unsaid; a callee named as its own caller is meant."""
    for callee in grant.callee:
        if callee not in grant.caller:
            yield from ((item, callee) for item in grant.caller if pattern_matches(item, callee))


def _never_matching(grant: Grant) -> Iterator[str]:
    if "event" not in grant.kinds:
        yield from (name for name in grant.capabilities if "." in name)


def _snippet(section: str, entry: dict[str, Any]) -> str:
    return yaml.safe_dump({section: [entry]}, sort_keys=False, default_flow_style=None, width=1000)
