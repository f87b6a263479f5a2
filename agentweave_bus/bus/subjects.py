"""Subjects: where on the broker each kind of message travels.

Every subject is ``aw.<family>.<domain>.<agent>.…``. A trust domain or a path is one token of it:
``.`` is written ``=``, which no SPIFFE ID may hold, and the path loses its leading ``/``. So the
mapping has an inverse, and two agents can't share a subject::

    spiffe://acme-corp.io/agent/billing, process_billing, as a call
    aw.call.acme-corp=io.agent/billing.process_billing

Building and parsing are inverse functions of plain text. Nothing here knows a connection, and a
subject alone proves nothing about who sent to it: only the signed head does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final

from agentweave_bus.exceptions import ConfigurationError, MalformedEnvelopeError
from agentweave_bus.names import CAPABILITY_NAME
from agentweave_bus.spiffe_id import SpiffeID

__all__ = [
    "MAX_SUBJECT_BYTES",
    "Family",
    "ParsedSubject",
    "agent_prefix",
    "api_inbox",
    "call_subject",
    "check_capability",
    "claim_subject",
    "parse_subject",
    "reply_inbox",
    "reply_subject",
]

MAX_SUBJECT_BYTES: Final = 1024

_REMEMBERED: Final = 1024
_TOKEN: Final = re.compile(r"[A-Za-z0-9_=/-]+")


class Family(StrEnum):
    """The second token of a subject: what kind of traffic it carries."""

    CALL = "call"
    TASK = "task"
    PARK = "park"
    EVENT = "event"
    PROGRESS = "progress"
    STATE = "state"
    CLAIM = "claim"
    BLOB = "blob"
    DEAD = "dead"
    CONTROL = "control"
    INBOX = "inbox"


@dataclass(frozen=True, slots=True)
class ParsedSubject:
    """A subject, taken apart: its family, the agent that it belongs to, and the tokens that follow."""

    family: Family
    agent: SpiffeID
    rest: tuple[str, ...]


def check_capability(name: object) -> str:
    """Return ``name`` if it is a capability's name: ``[a-z0-9][a-z0-9_-]{0,63}``.

    Raises:
        ConfigurationError: it is not.

    """
    if not isinstance(name, str) or not CAPABILITY_NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} is no capability name: use 1 to 64 of a-z, 0-9, '_' and '-', a letter or digit first"
        )
    return name


def agent_prefix(family: Family, agent: SpiffeID) -> str:
    """Return the first four tokens of each subject of ``agent`` in ``family``."""
    if not agent.path:
        raise ConfigurationError(f"{agent} is a trust domain; a subject belongs to an agent below it")
    domain = agent.trust_domain.replace(".", "=")
    path = agent.path[1:].replace(".", "=")
    return f"aw.{family}.{domain}.{path}"


def call_subject(callee: SpiffeID, capability: str) -> str:
    """Where calls of ``capability`` reach ``callee``."""
    return _call_subject(callee, check_capability(capability))


@lru_cache(_REMEMBERED)  # asked for several times in each call
def _call_subject(callee: SpiffeID, capability: str) -> str:
    return _bounded(f"{agent_prefix(Family.CALL, callee)}.{capability}")


def claim_subject(callee: SpiffeID, key: str) -> str:
    """Where ``callee`` claims the call whose claim key is ``key``."""
    return _bounded(f"{agent_prefix(Family.CLAIM, callee)}.{key}")


def api_inbox(agent: SpiffeID, instance: str) -> str:
    """Return the prefix under which a connection of ``agent`` receives the broker's own answers."""
    return _bounded(f"{agent_prefix(Family.INBOX, agent)}.{instance}.api")


@lru_cache(_REMEMBERED)
def reply_inbox(agent: SpiffeID, instance: str) -> str:
    """Return the prefix under which a connection of ``agent`` receives its peers' answers."""
    return _bounded(f"{agent_prefix(Family.INBOX, agent)}.{instance}.rpc")


def reply_subject(caller: SpiffeID, instance: str, request_id: str) -> str:
    """Where the answer to ``request_id`` goes.

    Caller, instance and id all come from the signed head, so the broker has no say in it. Each
    request has a subject of its own, so that an answer says which it is for before it is opened.
    """
    return f"{reply_inbox(caller, instance)}.{request_id}"


def parse_subject(subject: str) -> ParsedSubject:
    """Take a subject apart; the inverse of the functions above.

    Raises:
        MalformedEnvelopeError: the text is no subject of this project.

    """
    tokens = subject.split(".")
    if len(tokens) < 5 or tokens[0] != "aw" or len(subject) > MAX_SUBJECT_BYTES:  # noqa: PLR2004 - aw, family, domain, agent, rest
        raise MalformedEnvelopeError("not a subject of this bus")
    if not all(_TOKEN.fullmatch(token) for token in tokens):
        raise MalformedEnvelopeError("a token of the subject is empty or has a character that none may have")
    try:
        family = Family(tokens[1])
        agent = SpiffeID(f"spiffe://{tokens[2].replace('=', '.')}/{tokens[3].replace('=', '.')}")
    except ValueError as error:
        raise MalformedEnvelopeError("the subject names no family or no agent") from error
    if "/" in tokens[2]:  # part of a path could stand there, and two subjects would name one agent
        raise MalformedEnvelopeError("the subject's trust domain is none")
    return ParsedSubject(family, agent, tuple(tokens[4:]))


def _bounded(subject: str) -> str:
    if len(subject) > MAX_SUBJECT_BYTES:
        raise ConfigurationError(f"a subject has at most {MAX_SUBJECT_BYTES} bytes: {subject[:80]}…")
    return subject
