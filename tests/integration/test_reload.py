"""``--reload``: workers are replaced when their files change, and nobody notices but by the answer."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from tests.integration.dev_stack import FRONT, client_of, running
from tests.integration.probes import CLI, ECHO
from tests.integration.supervision import all_ready, pids, supervision
from tests.integration.world import World

pytestmark = pytest.mark.anyio


@pytest.mark.slow  # it starts six workers
async def test_a_worker_is_replaced_with_no_failed_call_and_stays_where_the_new_one_fails(
    tmp_path: Path,
) -> None:
    async with (
        running(tmp_path, "up", "--reload", "--env", "development") as one,
        client_of(one) as cli,
        anyio.create_task_group() as group,
    ):
        answers: list[str] = []

        async def keep_asking() -> None:
            while True:
                result = await cli.call(FRONT, "ask", {"word": "x"})
                assert result.data is not None, result.error
                answers.append(result.data["answer"])

        group.start_soon(keep_asking)
        one.edit("words.py", "first", "other")
        await one.until("words.py changed, which back is made of")
        with anyio.fail_after(30):
            while not answers or answers[-1] != "other x":  # noqa: ASYNC110 - other processes
                await anyio.sleep(0.02)
        assert answers[0] == "first x"
        assert "front is replaced" not in one.log  # it is not made of that file

        since = len(one.log)
        one.edit("back.py", "class Back", "clas Back")
        await one.until("back goes on as it is, its replacement failed", since)
        assert "SyntaxError: invalid syntax" in one.log[since:]
        told = len(answers)
        with anyio.fail_after(30):
            while len(answers) < told + 5:  # noqa: ASYNC110 - other processes
                await anyio.sleep(0.02)
        assert answers[-1] == "other x"
        group.cancel_scope.cancel()


@pytest.mark.slow  # it starts six workers
async def test_a_supervisor_follows_the_agents_files_and_its_own(world: World, tmp_path: Path) -> None:
    cli = await world.client(CLI)
    arguments = ("--reload", "--env", "development")
    async with supervision(world, tmp_path, {"replicas": 2}, arguments=arguments) as one:
        await one.ready()
        before = await one.until(all_ready)
        code = tmp_path / "live_agents.py"
        code.write_text(code.read_text().replace('"said": text', '"said": text + "!"'))
        after = await one.until(lambda now: all_ready(now) and not pids(now) & pids(before))
        assert [worker["restarts"] for worker in after] == [1, 1]
        assert (await cli.ask(ECHO, "say", {"text": "x"}))["said"] == "x!"

        stack = tmp_path / "stack.yaml"
        stack.write_text(stack.read_text().replace("replicas: 2", "replicas: 1"))
        await one.until(lambda now: len(now) == 1 and all_ready(now) and not pids(now) & pids(after))
        assert await one.end() == 0
