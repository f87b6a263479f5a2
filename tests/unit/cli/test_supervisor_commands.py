"""``agentweave supervisor`` asks a real supervisor over its socket; its workers are small programs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from agentweave_bus.cli import main
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.supervisor.autoscaling import ScaleRule
from agentweave_bus.supervisor.control_socket import SOCKET_NAME, control_socket
from agentweave_bus.supervisor.requests import answering
from agentweave_bus.supervisor.supervisor import Supervisor, supervised
from agentweave_bus.supervisor.worker_plan import WorkerPlan
from tests.unit.supervisor.programs import program

pytestmark = pytest.mark.anyio

BUSY = "ready()\nwhile True:\n    beat(backlog=45, in_flight=3)\n    time.sleep(every)\n"


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    async with supervised(on_line=lambda *_: None, on_event=lambda _: None) as made:
        await made.start(
            [WorkerPlan(spec=program("order", BUSY), scale=ScaleRule(1, 4)), WorkerPlan(spec=program("user"))]
        )
        made.scale("order", 1)  # so that the backlog does not change what is shown

        async def reload() -> None:
            if (tmp_path / "mistake").exists():
                raise ConfigurationError("the file has a mistake")
            await made.reload()

        async with control_socket(tmp_path / SOCKET_NAME, answering(made, reload)):
            yield made


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., Awaitable[int]]:
    def asked(*arguments: str) -> int:
        return main(["supervisor", *arguments, "--state-dir", str(tmp_path)])

    return lambda *arguments: anyio.to_thread.run_sync(asked, *arguments)


async def test_status_shows_workers_and_how_many_their_backlog_calls_for(
    supervisor, ask, capsys, monkeypatch
):
    monkeypatch.setattr("agentweave_bus.cli.supervisor.wants_json", lambda chosen: chosen)
    with anyio.fail_after(30):
        while supervisor.agents()[0]["wanted"] is None:  # noqa: ASYNC110 - another process
            await anyio.sleep(0.02)
    assert await ask("status") == 0
    workers, agents = capsys.readouterr().out.strip().split("\n\n")
    assert [line.split()[:2] for line in workers.splitlines()[1:]] == [
        ["order/1", "ready"],
        ["user", "ready"],
    ]
    assert [line.split() for line in agents.splitlines()] == [
        ["AGENT", "WORKERS", "MIN", "MAX", "BACKLOG", "WANTED"],
        ["order", "1", "1", "4", "45", "3", "held", "by", "hand"],
    ]


async def test_scaling_by_hand_within_bounds_and_back_to_the_backlog(supervisor, ask, capsys, tmp_path):
    assert await ask("scale", "order", "2", "--json") == 0
    assert [one["workers"] for one in supervisor.agents()] == [2, 1]
    assert await ask("scale", "order", "5") == 2
    assert "order may have 1 to 4 workers, not 5" in capsys.readouterr().err
    assert await ask("scale", "user", "auto") == 2
    assert "user has no min and max" in capsys.readouterr().err
    for words in (("scale", "odrer", "2"), ("drain", "odrer"), ("restart", "odrer")):
        assert await ask(*words) == 2
        assert "there is no agent 'odrer' here, but: order, user" in capsys.readouterr().err
    assert await ask("scale", "order", "auto") == 0
    assert supervisor.agents()[0]["held"] is False
    assert await ask("scale", "order", "3") == 0
    assert supervisor.agents()[0]["held"] is True
    (tmp_path / "mistake").touch()
    assert await ask("reload") == 2
    assert supervisor.agents()[0]["held"] is True  # nothing was taken up
    (tmp_path / "mistake").unlink()
    assert await ask("reload") == 0
    assert supervisor.agents()[0]["held"] is False
    with pytest.raises(SystemExit):
        await ask("scale", "order", "many")
    assert "'many' is neither a number nor auto" in capsys.readouterr().err
