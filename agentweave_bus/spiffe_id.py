"""SPIFFE IDs: the one grammar that every part shares.

A :class:`SpiffeID` is a ``str`` that has passed the strict grammar of the SPIFFE-ID specification
(section 2), so it can stand wherever text is wanted (JSON, logs, policy input) and nobody has to
parse it twice. It refuses what lenient parsers let through: a trailing newline, a trailing slash,
upper case in the trust domain, percent-encoding, empty or dot segments, over-long values.

This module knows nothing of certificates, files or networks.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, Self

from agentweave_bus.exceptions import InvalidSpiffeIdError

__all__ = ["MAX_SPIFFE_ID_BYTES", "MAX_TRUST_DOMAIN_BYTES", "SpiffeID", "check_trust_domain", "domain_id"]

MAX_SPIFFE_ID_BYTES: Final = 2048
MAX_TRUST_DOMAIN_BYTES: Final = 255

_SCHEME: Final = "spiffe://"
_TRUST_DOMAIN: Final = re.compile(r"[a-z0-9._-]+")
_SEGMENT: Final = re.compile(r"[A-Za-z0-9._-]+")


def check_trust_domain(text: str) -> str:
    """Return ``text`` if it is a valid trust domain name, such as ``acme-corp.io``.

    Raises:
        InvalidSpiffeIdError: it is not (SPIFFE-ID section 2.1).

    """
    if not _TRUST_DOMAIN.fullmatch(text):
        raise InvalidSpiffeIdError(
            f"{text!r} is no trust domain: use lower-case letters, digits, '.', '-' and '_' only"
        )
    if len(text) > MAX_TRUST_DOMAIN_BYTES:
        raise InvalidSpiffeIdError(f"a trust domain has at most {MAX_TRUST_DOMAIN_BYTES} bytes")
    return text


class SpiffeID(str):
    """A valid SPIFFE ID, as text.

    ``SpiffeID("spiffe://acme-corp.io/agent/billing")`` parses and checks; ``trust_domain`` and
    ``path`` are its parts. The path keeps its leading slash and is empty for a trust domain's own ID
    (``spiffe://acme-corp.io``). ``text`` is the same as a plain ``str``, for encoders that take nothing else.

    Raises:
        InvalidSpiffeIdError: the text breaks the grammar; the message names the part and the way out.

    """

    __slots__ = ("path", "text", "trust_domain")

    text: str
    trust_domain: str
    path: str

    def __new__(cls, text: str) -> Self:
        """Parse ``text``; a ``SpiffeID`` is returned as it is."""
        if type(text) is cls:
            return text
        trust_domain, path = _parse(text)
        self = super().__new__(cls, text)
        self.text = str.__str__(self)
        self.trust_domain = trust_domain
        self.path = path
        return self

    @classmethod
    def of(cls, trust_domain: str, *segments: str) -> SpiffeID:
        """Build the ID of ``segments`` in ``trust_domain``: ``of("a.io", "agent", "x")``."""
        return cls(_SCHEME + "/".join((trust_domain, *segments)))

    def __repr__(self) -> str:
        return f"SpiffeID({str(self)!r})"

    def __reduce__(self) -> tuple[type[SpiffeID], tuple[str]]:
        return (SpiffeID, (str(self),))


@lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[str, str]:
    if not text.startswith(_SCHEME):
        raise InvalidSpiffeIdError(f"{text[:80]!r} is no SPIFFE ID: it must start with 'spiffe://'")
    if len(text) > MAX_SPIFFE_ID_BYTES:
        raise InvalidSpiffeIdError(f"a SPIFFE ID has at most {MAX_SPIFFE_ID_BYTES} bytes")
    trust_domain, slash, rest = text[len(_SCHEME) :].partition("/")
    check_trust_domain(trust_domain)
    if not slash:
        return trust_domain, ""
    for segment in rest.split("/"):
        _check_segment(segment, text)
    return trust_domain, "/" + rest


def _check_segment(segment: str, text: str) -> None:
    if segment in {"", ".", ".."}:
        raise InvalidSpiffeIdError(f"{text!r} has an empty or dot segment, or ends with '/'")
    if not _SEGMENT.fullmatch(segment):
        raise InvalidSpiffeIdError(
            f"{text!r}: the path segment {segment!r} may hold letters, digits, '.', '-' and '_' only"
        )


@lru_cache(1024)  # each record is addressed to one
def domain_id(trust_domain: str) -> SpiffeID:
    """Return the SPIFFE ID of a trust domain itself, to which events and records are addressed.

    Raises:
        InvalidSpiffeIdError: it is no trust domain.

    """
    return SpiffeID(f"spiffe://{trust_domain}")
