"""From a capability's name and a payload to a result: the last step before, and the first after, a handler.

A :class:`CapabilityTable` holds what an agent can be asked for. Each :class:`BoundCapability` says who
may ask (its peer rules), validates a payload, and runs its handler: an ``async def`` on the event loop, a
plain ``def`` in a thread, both under the caller's deadline. Whatever a handler raises or returns, a
:class:`~agentweave_bus.types.TaskResult` comes out, and a caller learns no more of a failure than its
author meant to say.

Who is asking, and whether the policy allows it, was decided before; nothing here asks again.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from anyio import move_on_after

from agentweave_bus.agent.arguments import Arguments, ValidatedCall
from agentweave_bus.agent.attempts import Attempt, Performance
from agentweave_bus.agent.capability import CapabilitySpec, marks_of
from agentweave_bus.agent.context import bind_context, find_context
from agentweave_bus.agent.failures import (
    NO_FAILURE,
    being_cancelled,
    broken,
    correlation_id,
    failed,
    words_of,
)
from agentweave_bus.agent.peers import PeerRule
from agentweave_bus.agent.records import StepStore
from agentweave_bus.agent.saga import Verdict
from agentweave_bus.agent.threads import HandlerThreads
from agentweave_bus.agent.work import ProgressSink
from agentweave_bus.envelope.blob import WIDE_LIMITS
from agentweave_bus.envelope.codec import to_json_value
from agentweave_bus.envelope.envelope import JSON_CONTENT_TYPE
from agentweave_bus.exceptions import (
    ConfigurationError,
    PayloadError,
    RetryableError,
    StepFailedError,
    TaskFailedError,
)
from agentweave_bus.spiffe_id import SpiffeID
from agentweave_bus.tasks.retry import Retry
from agentweave_bus.types import Capability, DataPart, JsonValue, Message, TaskResult

__all__ = ["BoundCapability", "CapabilityTable", "ValidatedCall", "to_result"]

_ANSWER_SECONDS: Final = 0.1
"""What a handler that is too late leaves of its caller's time, for the answer that says so."""

_UNDO_SECONDS: Final = 10.0
"""What a call that is being cancelled has for its compensations."""


_to_json_value = functools.partial(to_json_value, limits=WIDE_LIMITS)
"""Results of tasks may be large; what is too large for an answer to a call is found when it is encoded."""


def to_result(value: Any) -> TaskResult:
    """Return what a handler returned as a result whose data are JSON values.

    A :class:`TaskResult` stays one; anything else (a pydantic model, a dataclass, a dict, a list, text, a
    number, ``None``) becomes a completed result with one data part.

    Raises:
        PayloadError: it has no JSON form.

    """
    if isinstance(value, TaskResult):
        return value.converted(_to_json_value)
    return TaskResult("completed", [Message("assistant", [DataPart(to_json_value(value, WIDE_LIMITS))])])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BoundCapability:
    """One capability of one agent, ready to run.

    ``schema`` is the JSON schema of its arguments; ``content_type`` what its payloads must be;
    ``timeout`` its own limit in seconds, for tasks that of one attempt without progress; ``concurrency``
    how many tasks of it run at a time, ``None`` where its author said nothing, and ``retry`` how often one
    is tried again; ``source`` the handler's name in the code.
    """

    name: str
    description: str
    safe: bool
    timeout: float | None
    source: str
    rules: tuple[PeerRule, ...]
    arguments: Arguments = field(repr=False)
    function: Callable[..., Any] = field(repr=False)
    threads: HandlerThreads = field(repr=False)
    logger: logging.Logger = field(repr=False)
    content_type: str = JSON_CONTENT_TYPE
    concurrency: int | None = None
    retry: Retry | None = None
    _is_async: bool = field(init=False, repr=False)
    """Of ``function``; looked up once, for it takes some looking."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_is_async", inspect.iscoroutinefunction(self.function))

    @property
    def schema(self) -> Mapping[str, Any]:
        """The JSON schema of the arguments."""
        return self.arguments.schema

    def admits_peer(self, spiffe_id: str) -> str | None:
        """Return why this caller may not ask, by the decorators beside the code; ``None`` when it may."""
        caller = SpiffeID(spiffe_id)
        return next((f"{self.name}: {why}" for rule in self.rules if (why := rule.refusal(caller))), None)

    def validate(self, value: JsonValue) -> ValidatedCall:
        """Check a decoded payload against the handler's annotations.

        Raises:
            PayloadError: it is not what the handler takes; the message names what and where.

        """
        return self.arguments.validate(value)

    async def invoke(self, call: ValidatedCall) -> TaskResult:
        """Run the handler with a validated call, until just before the deadline of the current request.

        Never raises for what the handler does: an exception becomes a failed result with a correlation
        id, and goes to the log with its traceback. When it fails, its steps are undone first.
        """
        seconds = self._seconds_left()
        if seconds <= 0:
            return self._too_late(seconds)
        result = None
        try:
            with move_on_after(seconds):
                result = await self._outcome(call.arguments)
        except asyncio.CancelledError:
            with move_on_after(_UNDO_SECONDS, shield=True):
                await _undone(failed("cancelled"))
            raise
        if result is None:
            result = self._too_late(seconds)
        return result if result.status != "failed" else await _undone(result)

    async def attempt(
        self,
        call: ValidatedCall,
        *,
        last_attempt: bool,
        store: StepStore | None = None,
        sink: ProgressSink | None = None,
        seconds: float | None = None,
    ) -> Attempt:
        """Run the handler for a task, until the task's deadline or ``timeout`` seconds without progress.

        ``seconds`` is in the timeout's place where the capability declares none.

        The current request is the task; its ``attempt`` must be the epoch of the task's log, for at the
        first nothing is looked up in ``store``. Without a store no step is recorded.

        Never raises for what the handler does. It may be tried again (:attr:`Attempt.retry`) after a
        ``RetryableError``, after its timeout, and when a nested call ended without an answer, reached
        nobody or was told when to come again (``CallTimeoutError``, ``UnreachableError``,
        ``CallRefusedError`` with ``retry_after``). It may not after any other error, after a failed
        result, or past the task's deadline.

        When it may not, or this is the ``last_attempt``, the task fails for good, and the compensations of
        its recorded steps run, last first. Should one fail, ``retry`` is true even so: give the task back
        and call this or :meth:`give_up` in the next attempt, however many there were; the number of
        passes is bounded here.

        Raises:
            AttemptLostError: another worker has the task; drop everything.
            Exception: what the store or the sink raised; nothing is decided, so give the task back.

        """
        performance = self._performance(call, store, sink, seconds)
        return await performance.attempt(last_attempt=last_attempt)

    async def give_up(
        self,
        call: ValidatedCall,
        result: TaskResult,
        *,
        store: StepStore | None = None,
        exhausted: bool = False,
    ) -> Attempt:
        """Let a task fail for good with ``result`` and no further attempt, and undo its recorded steps.

        For tasks that are cancelled, expired, or out of attempts because workers were lost. The handler
        runs only if there is something to undo, and only as far as recorded steps go. A result on which
        an earlier attempt decided wins, and so does what that one said of :attr:`Attempt.exhausted`; else
        ``exhausted`` is that. Returns and raises like :meth:`attempt`.
        """
        verdict = Verdict(result, exhausted=exhausted)
        return await self._performance(call, store, None).give_up(verdict)

    def _performance(
        self,
        call: ValidatedCall,
        store: StepStore | None,
        sink: ProgressSink | None,
        seconds: float | None = None,
    ) -> Performance:
        return Performance(
            name=self.name,
            timeout=seconds if self.timeout is None else self.timeout,
            logger=self.logger,
            handler=functools.partial(self._value, call.arguments),
            store=store,
            sink=sink,
        )

    def describe(self) -> Capability:
        """Return it as a card lists it."""
        return Capability(self.name, self.description, schema=self.schema)

    async def _outcome(self, arguments: dict[str, Any]) -> TaskResult:
        try:
            return to_result(await self._run(arguments))
        except (TaskFailedError, RetryableError) as error:
            return failed(words_of(error))
        except asyncio.CancelledError as error:
            if being_cancelled():
                raise
            return self._broken(error)  # the handler awaited something that was cancelled
        except NO_FAILURE:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the handler's; logged below
            return self._broken(error)

    async def _value(self, arguments: dict[str, Any]) -> TaskResult:
        return to_result(await self._run(arguments))

    async def _run(self, arguments: dict[str, Any]) -> Any:
        if self._is_async:
            return await self.function(**arguments)
        call = functools.partial(self.function, **arguments)
        context = find_context()
        value = await self.threads.run(call, None if context is None else context.caller_spiffe_id)
        return await value if inspect.isawaitable(value) else value

    def _seconds_left(self) -> float:
        context = find_context()
        remaining = context.remaining() if context else math.inf
        # Who calls stops waiting at the deadline, and the answer that says so has to be there by then.
        remaining -= _ANSWER_SECONDS if remaining > 10 * _ANSWER_SECONDS else remaining / 10
        return self.timeout if self.timeout and self.timeout < remaining else remaining

    def _broken(self, error: BaseException) -> TaskResult:
        number = correlation_id(error)
        traced = None if isinstance(error, StepFailedError) else error  # the step has logged it
        self.logger.error("capability %s failed", self.name, exc_info=traced, extra=self._extra(number))
        return broken(number)

    def _too_late(self, seconds: float) -> TaskResult:
        number = correlation_id()
        self.logger.warning(
            "capability %s had not ended after %.3f s", self.name, seconds, extra=self._extra(number)
        )
        return failed(f"deadline exceeded; correlation id {number}")

    def _extra(self, number: str) -> dict[str, Any]:
        extra = {"correlation_id": number, "capability": self.name}
        context = find_context()
        if context is None:
            return extra
        return {**extra, "caller": context.caller_spiffe_id, "task_id": context.task_id}


async def _undone(result: TaskResult) -> TaskResult:
    """Undo the steps of a call that failed, where it had any; return what to tell its caller."""
    context = find_context()
    work = None if context is None else context.begun_work()
    if context is None or work is None:
        return result
    with bind_context(context.for_undoing()):
        return (await work.steps.run_compensations(Verdict(result))).result


class CapabilityTable(Mapping[str, BoundCapability]):
    """What an agent can be asked for, by name.

    Raises:
        ConfigurationError: two handlers have one name (both are named), or a handler can't be served.

    """

    def __init__(self, logger: logging.Logger, threads: HandlerThreads | None = None) -> None:
        self._logger = logger
        self._threads: Final = threads or HandlerThreads()
        self._entries: dict[str, BoundCapability] = {}

    def add_methods(self, owner: object) -> None:
        """Add the decorated methods of ``owner``, inherited ones too.

        A method that overrides a capability without decorators stays that capability; restrictions of
        what it overrides stay as well, so that a subclass can narrow but never widen by omission.
        """
        for attribute in _attributes(type(owner)):
            spec, rules = _inherited(type(owner), attribute)
            if spec is not None:
                self._add(getattr(owner, attribute), spec, rules, type(owner))

    def add_function(self, function: Callable[..., Any]) -> None:
        """Add a plain function that ``@capability`` decorates."""
        marks = marks_of(function)
        if marks is None or marks.spec is None:
            raise ConfigurationError(f"{_source(function)} has no @capability.")
        self._add(function, marks.spec, tuple(marks.rules), None)

    def _add(
        self,
        function: Callable[..., Any],
        spec: CapabilitySpec,
        rules: Iterable[PeerRule],
        owner: type | None,
    ) -> None:
        if spec.name in self._entries:
            raise ConfigurationError(
                f"Capability {spec.name!r} is declared twice: by {self._entries[spec.name].source}"
                f" and by {_source(function)}.",
                hint="Rename one.",
            )
        _refuse_generator(function)
        self._entries[spec.name] = BoundCapability(
            name=spec.name,
            description=spec.description or _first_line(function),
            safe=spec.safe,
            timeout=spec.timeout,
            concurrency=spec.concurrency,
            retry=spec.retry,
            source=_source(function),
            rules=tuple(rules),
            arguments=Arguments(spec.name, function, owner),
            function=function,
            threads=self._threads,
            logger=self._logger,
        )

    def resolve(self, name: str) -> BoundCapability:
        """Return the capability called ``name``.

        Raises:
            PayloadError: there is none; the message names the nearest one.

        """
        if name in self._entries:
            return self._entries[name]
        near = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self._entries)}"
        raise PayloadError(f"there is no capability {name!r:.80} ({hint})")

    def __getitem__(self, name: str) -> BoundCapability:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _attributes(owner: type) -> dict[str, None]:
    """Every attribute that some class of the hierarchy decorates, base classes first, in their order."""
    return {
        name: None
        for cls in reversed(owner.__mro__)
        for name, value in vars(cls).items()
        if marks_of(value) is not None
    }


def _inherited(owner: type, attribute: str) -> tuple[CapabilitySpec | None, tuple[PeerRule, ...]]:
    definitions = [vars(cls)[attribute] for cls in owner.__mro__ if attribute in vars(cls)]
    if not inspect.isfunction(definitions[0]):
        return None, ()  # overridden by something that is no method: taken away
    marks = [found for definition in definitions if (found := marks_of(definition))]
    spec = next((found.spec for found in marks if found.spec), None)
    if spec is None and any(found.event for found in marks):
        return None, ()  # it is asked for nothing; see events.py
    if spec is None:
        raise ConfigurationError(
            f"{owner.__qualname__}.{attribute} restricts its callers but is no capability.",
            hint='Add @capability("name"), or remove the restriction.',
        )
    return spec, tuple(dict.fromkeys(rule for found in marks for rule in found.rules))


def _refuse_generator(function: Callable[..., Any]) -> None:
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(
            f"{_source(function)} is a generator; a capability returns one result.",
            hint="Return a list or a TaskResult.",
        )


def _source(function: Any) -> str:
    return str(getattr(function, "__qualname__", function))


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").strip().partition("\n")[0]
