"""The decorators with which an author says what an agent can be asked for, and by whom.

They return the function unchanged, so it can still be called and tested as what it is. What they say is
kept in one :class:`Marks` object on the function, shared by all of them, so their order does not matter.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from agentweave_bus.agent.peers import PeerPatterns, PeerRule, TrustDomains
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.names import CAPABILITY_NAME
from agentweave_bus.tasks.retry import Retry

__all__ = [
    "CapabilitySpec",
    "EventSpec",
    "Marks",
    "capability",
    "check_capability_name",
    "check_timeout",
    "marks_of",
    "marks_to_write",
    "requires_federated_peer",
    "requires_peer",
]

F = TypeVar("F", bound=Callable[..., Any])

_ATTRIBUTE: Final = "__agentweave__"


@dataclass(frozen=True, slots=True)
class CapabilitySpec:
    """What ``@capability`` said. ``timeout`` is in seconds, ``None`` for the caller's deadline alone.

    ``concurrency`` and ``retry`` are about tasks; ``None`` where nothing was said.
    """

    name: str
    safe: bool = False
    description: str | None = None
    timeout: float | None = None
    concurrency: int | None = None
    retry: Retry | None = None


@dataclass(frozen=True, slots=True)
class EventSpec:
    """What ``@on_event`` said. ``timeout`` is in seconds, of one attempt."""

    pattern: str
    durable: bool = True
    every: bool = False
    ordered: bool = False
    timeout: float | None = None
    retry: Retry | None = None


@dataclass(slots=True)
class Marks:
    """All that decorators said about one function."""

    spec: CapabilitySpec | None = None
    event: EventSpec | None = None
    rules: list[PeerRule] = field(default_factory=list)


def check_capability_name(name: object) -> str:
    """Return ``name`` if it can be a capability's: ``[a-z0-9][a-z0-9_-]{0,63}``.

    Raises:
        ConfigurationError: it can't; the message offers the nearest name that can.

    """
    if callable(name):
        raise ConfigurationError("@capability needs a name.", hint='Write @capability("name").')
    if isinstance(name, str) and CAPABILITY_NAME.fullmatch(name):
        return name
    raise ConfigurationError(
        f"{name!r} can't name a capability: use 1 to 64 of a-z, 0-9, '_' and '-', a letter or digit first.",
        hint=_suggestion(name),
    )


def _suggestion(name: object) -> str | None:
    guess = re.sub(r"[^a-z0-9_-]+", "_", str(name).lower()).strip("_-")[:64]
    close = difflib.SequenceMatcher(None, str(name).lower(), guess).ratio() > 0.5  # noqa: PLR2004 - half alike
    return f"Try {guess!r}." if close and CAPABILITY_NAME.fullmatch(guess) else None


def capability(
    name: str,
    *,
    safe: bool = False,
    description: str | None = None,
    timeout: float | None = None,
    concurrency: int | None = None,
    retry: Retry | None = None,
) -> Callable[[F], F]:
    """Make a method (or a function of an ``Agent``) answer requests for ``name``.

    ``safe`` says that running it has no side effects, as HTTP uses the word: it may run twice, so a
    retry needs no claim. ``description`` defaults to the docstring's first line. ``timeout`` (seconds)
    ends it sooner than the caller's deadline would; for a task it is that of each attempt, and progress
    lets it begin anew.

    The rest is about tasks alone: at most ``concurrency`` of them run at a time in this process, and
    ``retry`` says how often one is tried again.

    Raises:
        ConfigurationError: the name, timeout, concurrency or retry is malformed, or the function already
            has a name.

    """
    spec = CapabilitySpec(
        check_capability_name(name),
        safe,
        description,
        check_timeout(timeout),
        _check_concurrency(concurrency),
        _check_retry(retry),
    )

    def mark(function: F) -> F:
        marks = marks_to_write(function, f"@capability({name!r})")
        if marks.spec is not None:
            raise ConfigurationError(
                f"{_label(function)} is already capability {marks.spec.name!r}, not also {name!r}.",
                hint="Give each capability a function of its own.",
            )
        marks.spec = spec
        return function

    return mark


def requires_federated_peer(*, trust_domains: Iterable[str]) -> Callable[[F], F]:
    """Let only callers of these trust domains reach the capability; the policy is still asked.

    Raises:
        ConfigurationError: the list is empty or names what is no trust domain.

    """
    return _restricting(TrustDomains.of(trust_domains), "@requires_federated_peer")


def requires_peer(*patterns: str) -> Callable[[F], F]:
    """Let only callers that match a pattern reach the capability; the policy is still asked.

    A pattern is a SPIFFE ID, or one ending in ``/*`` for all below it. Several decorators must all admit.

    Raises:
        ConfigurationError: there is no pattern, or one is malformed.

    """
    return _restricting(PeerPatterns.of(patterns), "@requires_peer")


def _restricting(rule: PeerRule, decorator: str) -> Callable[[F], F]:
    def mark(function: F) -> F:
        marks_to_write(function, decorator).rules.append(rule)
        return function

    return mark


def marks_of(function: object) -> Marks | None:
    """Return what the decorators said about ``function``, if any did."""
    marks = getattr(function, _ATTRIBUTE, None)
    return marks if isinstance(marks, Marks) else None


def marks_to_write(function: Any, decorator: str) -> Marks:
    """Return where ``decorator`` writes what it says about ``function``. Raises ConfigurationError."""
    if not inspect.isfunction(function):
        raise ConfigurationError(
            f"{decorator} goes on a plain function or method, not on a {type(function).__name__}."
        )
    marks = marks_of(function)
    if marks is None:
        marks = Marks()
        setattr(function, _ATTRIBUTE, marks)
    return marks


def check_timeout(timeout: float | None) -> float | None:
    """Return a timeout in seconds, if it is one. Raises ConfigurationError."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise ConfigurationError(f"A timeout is a number of seconds, not {timeout!r}.")
    if not (math.isfinite(timeout) and timeout > 0):
        raise ConfigurationError(f"A timeout must be a positive number of seconds, not {timeout!r}.")
    return float(timeout)


def _check_concurrency(concurrency: int | None) -> int | None:
    if concurrency is not None and (type(concurrency) is not int or concurrency < 1):
        raise ConfigurationError(f"A concurrency is a whole number from 1, not {concurrency!r}.")
    return concurrency


def _check_retry(retry: Retry | None) -> Retry | None:
    if retry is not None and not isinstance(retry, Retry):
        raise ConfigurationError(
            f"retry is a Retry, not {retry!r:.80}.", hint="Write Retry(attempts=5), for instance."
        )
    return retry


def _label(function: Any) -> str:
    return str(getattr(function, "__qualname__", function))
