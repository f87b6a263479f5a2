"""What one run of a handler has beside its request: steps, a deadline of its own, a sink for progress.

A plain call gets one when it first asks for a step; a task's attempt has one from its beginning.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, Self
from weakref import WeakKeyDictionary

from anyio import CancelScope

from agentweave_bus.agent.saga import Halt, Ledger
from agentweave_bus.agent.steps import Steps
from agentweave_bus.agent.threads import HandlerThreads
from agentweave_bus.envelope.codec import to_json_value
from agentweave_bus.exceptions import AgentWeaveError, AttemptLostError, PayloadError
from agentweave_bus.types import Artifact

__all__ = ["Deadline", "ProgressSink", "Work", "check_progress", "checked_artifact"]

_LONGEST_MESSAGE: Final = 1000
_logger: Final = logging.getLogger(__name__)


class ProgressSink(Protocol):
    """Where the progress of one attempt goes.

    :class:`AttemptLostError` stops the attempt. A :class:`PayloadError` (too large) reaches the handler.
    Any other error of this package is logged, and the handler goes on: progress is a courtesy.
    """

    async def progress(self, fraction: float, message: str) -> None:
        """Tell that ``fraction`` (0 to 1) is done."""

    async def artifact(self, artifact: Artifact) -> None:
        """Hand over a part of the result before its end; ``data`` is a JSON value."""


class Deadline:
    """When an attempt ends. It is the deadline of a scope, and moves with it.

    ``seconds`` is how long the attempt may go without progress, ``latest`` (on the event loop's clock) what
    no progress moves.
    """

    def __init__(self, scope: CancelScope, seconds: float | None, latest: float) -> None:
        self._scope = scope
        self._seconds = math.inf if seconds is None else seconds
        self._latest = latest
        self.extend()

    def extend(self) -> None:
        """Let the attempt's time begin anew."""
        self._scope.deadline = min(asyncio.get_running_loop().time() + self._seconds, self._latest)

    @property
    def is_last(self) -> bool:
        """Whether what ends is more than this attempt: nothing may be begun after it."""
        return self._scope.deadline >= self._latest


@dataclass(slots=True)
class Work:
    """One run of one handler. A call has neither halt, deadline nor sink."""

    steps: Steps
    halt: Halt | None = None
    deadline: Deadline | None = None
    sink: ProgressSink | None = None

    @classmethod
    def of_call(cls, caller: str) -> Self:
        """Return what a call has, which is asked for by ``caller``."""
        return cls(Steps(partial(_in_step_thread, caller=caller)))

    @classmethod
    def of_attempt(
        cls, caller: str, ledger: Ledger | None, timeout: float | None, sink: ProgressSink | None
    ) -> Self:
        """Return what an attempt of a task has."""
        halt = ledger.halt if ledger else Halt()
        in_thread = partial(_in_step_thread, caller=caller)
        return cls(Steps(in_thread, ledger, timeout=timeout), halt, sink=sink)

    async def progress(self, fraction: float, message: str) -> None:
        """Tell of progress, and let the attempt's timeout begin anew."""
        await self._tell(lambda sink: sink.progress(fraction, message))

    async def artifact(self, artifact: Artifact) -> None:
        """Hand over a part of the result, which is progress, too."""
        await self._tell(lambda sink: sink.artifact(artifact))

    async def _tell(self, tell: Callable[[ProgressSink], Any]) -> None:
        if self.deadline is not None:
            self.deadline.extend()
        if self.sink is None or self.steps.verdict is not None:
            return  # a replay tells what was told before
        try:
            await tell(self.sink)
        except PayloadError:
            raise
        except AttemptLostError as error:
            if self.halt is not None:
                await self.halt.stop(error)
            raise
        except AgentWeaveError as error:
            _logger.warning("progress could not be told: %s", error)


def check_progress(fraction: object, message: object) -> None:
    """Refuse what is no progress.

    Raises:
        PayloadError: ``fraction`` is not from 0 to 1, or ``message`` is longer than 1000 characters.

    """
    if not (isinstance(fraction, (int, float)) and type(fraction) is not bool and 0 <= fraction <= 1):
        raise PayloadError(f"progress is a fraction from 0 to 1, not {fraction!r:.80}")
    if not isinstance(message, str) or len(message) > _LONGEST_MESSAGE:
        raise PayloadError(f"a message of progress is a text of at most {_LONGEST_MESSAGE} characters")


def checked_artifact(kind: object, data: object, name: object) -> Artifact:
    """Return an artifact with ``data`` in its JSON form.

    Raises:
        PayloadError: it has none, or ``kind`` or ``name`` is no text.

    """
    if not (isinstance(kind, str) and isinstance(name, str | None)):
        raise PayloadError("an artifact's type and name are texts")
    made = Artifact(type=kind, data=to_json_value(data))
    if name is not None:
        made["name"] = name
    return made


_threads: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, HandlerThreads]] = WeakKeyDictionary()


async def _in_step_thread(call: Callable[[], Any], *, caller: str) -> Any:
    """Run a step's plain function.

    Steps have threads of their own: were they those of the handlers, handlers that wait in all of them for
    a step would wait for ever.
    """
    loop = asyncio.get_running_loop()
    threads = _threads.get(loop)
    if threads is None:
        threads = _threads[loop] = HandlerThreads()
    return await threads.run(call, caller)
