"""Handlers of events: what an agent hears of, and how.

``@on_event("order.*")`` on a method makes it a subscription. What is published reaches it with the data that
were published as its arguments; ``self.context.event`` is the event's name, ``self.context.key`` its key.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final, Literal, TypeVar

from agentweave_bus.agent.arguments import Arguments
from agentweave_bus.agent.capability import EventSpec, check_timeout, marks_of, marks_to_write
from agentweave_bus.agent.dispatch import BoundCapability
from agentweave_bus.agent.threads import HandlerThreads
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.names import EVENT_PATTERN, common_event, covers_event
from agentweave_bus.tasks.retry import Retry

__all__ = ["DEFAULT_EVENT_RETRY", "EventHandler", "EventHandlers", "on_event"]

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_EVENT_RETRY: Final = Retry(attempts=5)
"""How often an event is tried again, where its handler does not say."""


def on_event(
    pattern: str,
    *,
    durable: bool = True,
    replicas: Literal["one", "every"] = "one",
    ordered: bool = False,
    timeout: float | None = None,
    retry: Retry | None = None,
) -> Callable[[F], F]:
    """Have a method handle the events for which ``pattern`` is: a name, ``order.*`` (all below), or ``*``.

    A ``durable`` subscription gets each event at least once, from when it was first there, also what was
    published while no replica was up; one replica handles it. Without it only what is published while
    somebody listens arrives, at most once; ``replicas="every"`` then lets each replica handle it.
    ``ordered`` handles the events of one publisher one after the other, in their order. ``timeout`` (seconds)
    ends an attempt, ``retry`` says how often and when a failed one is repeated.

    Raises:
        ConfigurationError: the pattern is malformed, what is asked for contradicts itself, or the method
            handles events already.

    """
    _check_pattern(pattern)
    spec = EventSpec(pattern, durable, replicas == "every", ordered, check_timeout(timeout), retry)
    _check(spec, replicas)

    def mark(function: F) -> F:
        marks = marks_to_write(function, f"@on_event({pattern!r})")
        if marks.event is not None:
            raise ConfigurationError(
                f"{_source(function)} handles {marks.event.pattern!r} already, not also {pattern!r}.",
                hint="Give each subscription a method of its own.",
            )
        marks.event = spec
        return function

    return mark


def _check_pattern(pattern: object) -> None:
    if not isinstance(pattern, str) or not EVENT_PATTERN.fullmatch(pattern):
        raise ConfigurationError(
            f"{pattern!r} is no pattern of events.",
            hint='Write a name such as @on_event("order.created"), "order.*" for all below, or "*".',
        )


def _check(spec: EventSpec, replicas: object) -> None:
    if replicas not in ("one", "every"):
        raise ConfigurationError(f"replicas is 'one' or 'every', not {replicas!r}.")
    if spec.every and spec.durable:
        raise ConfigurationError(
            "What every replica gets is not kept for those that are not there.",
            hint='Write durable=False beside replicas="every".',
        )
    if not spec.durable and (spec.ordered or spec.retry is not None):
        raise ConfigurationError(
            "Only a durable subscription is ordered, and only it is given an event again.",
            hint="Remove durable=False, or ordered and retry.",
        )


@dataclass(frozen=True, slots=True)
class EventHandler:
    """One subscription of one agent, ready to run."""

    spec: EventSpec
    bound: BoundCapability

    @property
    def source(self) -> str:
        """The method's name in the code."""
        return self.bound.source

    @property
    def retry(self) -> Retry:
        """How often a failed event is tried again."""
        return self.spec.retry or DEFAULT_EVENT_RETRY


class EventHandlers:
    """What an agent hears of.

    Raises:
        ConfigurationError: two durable handlers would get the same event, or one can't be served.

    """

    def __init__(self, owner: object, logger: logging.Logger) -> None:
        self._all = tuple(_bound(owner, logger))
        durable = [one for one in self._all if one.spec.durable]
        for one, other in combinations(durable, 2):
            if (both := common_event(one.spec.pattern, other.spec.pattern)) is not None:
                raise ConfigurationError(
                    f"{both!r} would be handled twice: by {one.source} and by {other.source}.",
                    hint="An event has one durable handler in an agent; let that one call both.",
                )

    def __iter__(self) -> Iterator[EventHandler]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def durable(self, name: str) -> EventHandler | None:
        """Return the durable handler of the event ``name``."""
        return next(
            (one for one in self._all if one.spec.durable and covers_event(one.spec.pattern, name)), None
        )

    def patterns(self, *, ordered: bool) -> tuple[str, ...]:
        """Return the patterns of the durable handlers that are ``ordered``, or of those that are not."""
        return tuple(
            one.spec.pattern for one in self._all if one.spec.durable and one.spec.ordered is ordered
        )


def _bound(owner: object, logger: logging.Logger) -> Iterator[EventHandler]:
    threads = HandlerThreads()
    kind = type(owner)
    names = {
        name: None for cls in reversed(kind.__mro__) for name, value in vars(cls).items() if _event_of(value)
    }
    for name in names:
        definitions = [vars(cls)[name] for cls in kind.__mro__ if name in vars(cls)]
        if not inspect.isfunction(definitions[0]):
            continue  # overridden by something that is no method: taken away
        spec = next(event for one in definitions if (event := _event_of(one)) is not None)
        marks = [found for one in definitions if (found := marks_of(one)) is not None]
        function = getattr(owner, name)
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigurationError(f"{_source(function)} is a generator; it can't handle events.")
        yield EventHandler(
            spec,
            BoundCapability(
                name=spec.pattern,
                description=(inspect.getdoc(function) or "").strip().partition("\n")[0],
                safe=False,
                timeout=spec.timeout,
                source=_source(function),
                rules=tuple(dict.fromkeys(rule for found in marks for rule in found.rules)),
                arguments=Arguments(spec.pattern, function, kind),
                function=function,
                threads=threads,
                logger=logger,
                retry=spec.retry,
            ),
        )


def _event_of(function: object) -> EventSpec | None:
    marks = marks_of(function)
    return marks.event if marks is not None else None


def _source(function: Any) -> str:
    return str(getattr(function, "__qualname__", function))
