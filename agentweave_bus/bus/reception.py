"""The span of what arrives: a call that is answered, a task or an event that is processed.

It covers all of it, from the arrival to the reply or the acknowledgement, and stands below the span of its
sender. It is begun, as of the arrival, when the sender is proved (step 5 of admission), and not before:
whoever can't sign chooses no trace, has nothing sampled, and gives no span a name. The name comes with the
binding (step 6), when the capability is known to be one of this agent's.

Used only where tracing is on; without it there is none here, and nothing is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from agentweave_bus.envelope import OpenedEnvelope
from agentweave_bus.observability.conventions import Attributes
from agentweave_bus.observability.spans import Span, SpanKind
from agentweave_bus.observability.tracing import Tracing

__all__ = ["Described", "Describes", "Reception", "current_reception", "received", "tell_outcome"]


class Described(NamedTuple):
    """What the span of an arrival is called and says."""

    name: str
    attributes: Attributes


Describes = Callable[[OpenedEnvelope, str | None], Described]
"""Describes a request, with the name of the capability once that is known to be one of this agent's."""


class Reception:
    """One arrival, while it is dealt with."""

    def __init__(self, tracing: Tracing, kind: SpanKind, describe: Describes) -> None:
        self._tracing = tracing
        self._kind = kind
        self._describe = describe
        self._block = ExitStack()
        self.began_ns = time.time_ns()
        self.span: Span | None = None

    def proved(self, request: OpenedEnvelope) -> None:
        """Begin the span, unless it has begun: from here on it is known who sends this."""
        if self.span is None:
            name, attributes = self._describe(request, None)
            self.span = self._block.enter_context(
                self._tracing.received(
                    name,
                    kind=self._kind,
                    parent=request.head.trace,
                    attributes=attributes,
                    began_ns=self.began_ns,
                )
            )

    def bound(self, request: OpenedEnvelope, capability: str) -> None:
        """Name the span: ``capability`` is what is asked for."""
        if self.span is not None:
            name, attributes = self._describe(request, capability)
            self.span.rename(name)
            for key, value in attributes.items():
                self.span.set_attribute(key, value)

    def failed(self, kind: str) -> None:
        """Mark the span as failed."""
        if self.span is not None:
            self.span.set_error(kind)


_here: ContextVar[Reception | None] = ContextVar("agentweave_reception", default=None)


def current_reception() -> Reception | None:
    """Return what is being dealt with here."""
    return _here.get()


@contextmanager
def received(tracing: Tracing, kind: SpanKind, describe: Describes) -> Iterator[Reception]:
    """Deal with an arrival inside the block; its span, if it comes to have one, ends with it."""
    reception = Reception(tracing, kind, describe)
    token = _here.set(reception)
    try:
        with reception._block:  # noqa: SLF001 -- it is its own
            yield reception
    finally:
        _here.reset(token)


def tell_outcome(span: Span, *, failed: bool, retry: bool = False) -> None:
    """Say on a handler's span, and on that of what it handled, how it ended and whether it is repeated."""
    if retry:
        span.set_attribute("agentweave.retry", retry)
    if failed:
        span.set_error("failed")
        if (reception := _here.get()) is not None:
            reception.failed("failed")
