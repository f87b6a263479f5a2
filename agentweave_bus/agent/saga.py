"""What a task has to undo when it fails for good, written down so that a crash does not forget it.

Beside an author's steps, whose names have no colon, the store of a task's steps holds:

``saga:<n>``
    the name of the n-th step with a compensation, written before its function runs;
``saga:failing``
    the verdict: that the task fails for good, and with what result. From here on the handler runs only to
    find the compensations again;
``saga:pass:<n>``
    that the n-th pass through the compensations began;
``saga:undoer``
    written by the worker, not here: which message of the queue undoes a task that ended between two attempts;
``undo:<step>``
    that the step's compensation is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NoReturn

from anyio import Lock, fail_after
from anyio.lowlevel import checkpoint

from agentweave_bus.agent.records import StepRecord, StepStore
from agentweave_bus.bus.cancel_scopes import cancel_scope
from agentweave_bus.exceptions import AgentWeaveError, PayloadError
from agentweave_bus.types import JsonValue, TaskResult

__all__ = ["Halt", "Ledger", "Saga", "Verdict"]

_SAVE_SECONDS: Final = 30.0
_FAILING: Final = "saga:failing"


class Halt:
    """Ends an attempt from inside. Its handler is cancelled, which ``except Exception`` can't pass over.

    ``scope`` is around the handler, and its deadline is the attempt's; ``fault`` is what made the attempt
    useless, if anything did. Who stops it without a fault has a verdict by which the task has failed.
    """

    def __init__(self) -> None:
        self.scope: Final = cancel_scope()
        self.fault: BaseException | None = None

    async def stop(self, fault: BaseException | None = None) -> NoReturn:
        """Cancel the attempt and don't return."""
        self.fault = self.fault or fault
        self.scope.cancel()
        await checkpoint()  # ends here, in all that runs inside the scope
        raise fault or AgentWeaveError("the attempt that this step belongs to is over")


class Ledger:
    """A :class:`StepStore` whose faults halt the attempt. ``fresh``: nothing can have been saved before."""

    def __init__(self, store: StepStore, halt: Halt, *, fresh: bool = False) -> None:
        self.halt: Final = halt
        self.fresh: Final = fresh
        self._store = store

    async def load(self, name: str) -> StepRecord | None:
        """Return what an earlier attempt saved, or this one unless the ledger is fresh."""
        if self.fresh:
            return None
        try:
            return await self._store.load(name)
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing is known of the step
            await self.halt.stop(error)

    async def confirm(self) -> None:
        """Make sure that the task is still this attempt's."""
        try:
            await self._store.confirm()
        except Exception as error:  # noqa: BLE001 - as above
            await self.halt.stop(error)

    async def save(self, name: str, record: StepRecord) -> StepRecord:
        """Write, and finish that even when the attempt is being cancelled: what it says has happened.

        Raises:
            PayloadError: the record can't be stored.

        """
        try:
            with fail_after(_SAVE_SECONDS, shield=True):
                return await self._store.save(name, record)
        except PayloadError:
            raise
        except Exception as error:  # noqa: BLE001 - as above
            await self.halt.stop(error)


@dataclass(frozen=True, slots=True)
class Verdict:
    """That a task fails for good: its result, and the correlation id if there is one.

    ``exhausted`` says that it only lacks attempts, and has not failed by what its handler says.
    """

    result: TaskResult
    correlation_id: str | None = None
    exhausted: bool = False

    def to_record(self) -> StepRecord:
        """Return what is written down."""
        said = {"result": self.result.to_json(), "correlation_id": self.correlation_id}
        return StepRecord({**said, "exhausted": self.exhausted})

    @classmethod
    def from_record(cls, record: StepRecord) -> Verdict:
        """Read what :meth:`to_record` wrote; raises :class:`PayloadError` for anything else."""
        value = record.value
        if not isinstance(value, dict):
            raise PayloadError("a verdict is a JSON object")
        number = value.get("correlation_id")
        result, exhausted = TaskResult.from_json(value.get("result")), value.get("exhausted") is True
        return cls(result, None if number is None else str(number), exhausted)


class Saga:
    """One task's compensations. ``announced`` are the steps that have one, in the order of their start."""

    def __init__(self, ledger: Ledger) -> None:
        self.announced: list[str] = []
        self._ledger = ledger
        self._recalled = ledger.fresh
        self._pass: int | None = None
        self._lock = Lock()

    async def recall(self) -> None:
        """Find what earlier attempts announced."""
        async with self._lock:
            await self._recall()

    async def _recall(self) -> None:
        while not self._recalled:
            record = await self._ledger.load(f"saga:{len(self.announced) + 1}")
            if record is None:
                self._recalled = True
            else:
                self.announced.append(str(record.value))

    async def announce(self, name: str) -> None:
        """Write down that step ``name``, which has a compensation, is about to run."""
        async with self._lock:  # one after the other, so that there are no gaps
            await self._recall()
            if name not in self.announced:
                await self._ledger.save(f"saga:{len(self.announced) + 1}", StepRecord(name))
                self.announced.append(name)

    async def verdict(self) -> Verdict | None:
        """Return the verdict that stands, if one does."""
        record = await self._ledger.load(_FAILING)
        return None if record is None else Verdict.from_record(record)

    async def settle(self, verdict: Verdict) -> Verdict:
        """Write ``verdict`` down unless one stands; return the one that stands."""
        standing = await self.verdict()
        if standing is None:
            await self._ledger.save(_FAILING, verdict.to_record())
        return standing or verdict

    async def begin_pass(self, most: int) -> int:
        """Count a pass through the compensations; return its number, more than ``most`` if none is left."""
        number = self._pass or 1
        while self._pass is None and number <= most and await self._ledger.load(_pass(number)):
            number += 1
        if self._pass is None and number <= most:
            await self._ledger.save(_pass(number), StepRecord())
        self._pass = number
        return number

    async def is_undone(self, name: str) -> bool:
        """Return whether the compensation of step ``name`` is done."""
        return await self._ledger.load(f"undo:{name}") is not None

    async def undone(self, name: str) -> None:
        """Write down that it is."""
        await self._ledger.save(f"undo:{name}", StepRecord())

    async def value_of(self, name: str) -> tuple[JsonValue] | None:
        """Return the recorded value of step ``name`` in a tuple of one; ``None``: there is none."""
        record = await self._ledger.load(name)
        return None if record is None or record.error is not None else (record.value,)


def _pass(number: int) -> str:
    return f"saga:pass:{number}"
