"""What the supervisor says of its workers: over its unix socket, or from a supervisor of this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from agentweave_bus.console.model import ConsoleModel
from agentweave_bus.console.watched import Watched
from agentweave_bus.exceptions import AgentWeaveError
from agentweave_bus.supervisor.control_socket import ask_supervisor

__all__ = ["WorkersFeed", "WorkersSource"]

WorkersSource = Path | Callable[[], Sequence[dict[str, Any]]]
"""A supervisor's socket, or what returns its status in this process."""

_ASK_S: Final = 3.0
_NONE_NAMED: Final = "no supervisor was named"
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Told(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Beat(_Told):
    lag_s: _Number
    in_flight: int
    handled: int
    resident: int
    connected: bool
    idle_s: _Number | None = None
    svid_s: _Number | None = None


class _Worker(_Told):
    name: str
    agent: str = ""
    state: str
    why: str = ""
    pid: int | None = None
    restarts: int = 0
    up_s: _Number | None = None
    beat: _Beat | None = None


_WORKERS: Final = TypeAdapter(tuple[_Worker, ...])


class WorkersFeed:
    """Asks every second while somebody looks, and now and then otherwise."""

    def __init__(self, model: ConsoleModel, source: WorkersSource | None, watched: Watched) -> None:
        self._model = model
        self._source = source
        self._watched = watched

    async def run(self) -> None:
        """Ask until cancelled."""
        if self._source is None:
            self._model.source_failed("workers", _NONE_NAMED)
            return
        while True:
            try:
                workers = _WORKERS.validate_python(await self._status(self._source))
            except (AgentWeaveError, ValidationError) as error:
                told = "its answer is not understood" if isinstance(error, ValidationError) else str(error)
                self._model.set_workers(())
                self._model.source_failed("workers", told)
            else:
                self._model.set_workers([one.model_dump() for one in workers])
                self._model.source_well("workers")
            await self._watched.pause(1.0, unwatched_s=5.0)

    async def _status(self, source: WorkersSource) -> Any:
        if not isinstance(source, Path):
            return source()
        answer = await ask_supervisor(source, {"do": "status"}, _ASK_S)
        return answer.get("workers") if isinstance(answer, dict) else None
