"""Workers under a supervisor; each is a real process that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from agentweave_bus.exceptions import AgentWeaveError, WorkerError
from agentweave_bus.supervisor import place
from agentweave_bus.supervisor.autoscaling import ScaleRule
from agentweave_bus.supervisor.place import PlaceState
from agentweave_bus.supervisor.rules import HealthRule, RecycleRule, RestartRule
from agentweave_bus.supervisor.supervisor import Supervisor, supervised
from agentweave_bus.supervisor.worker_plan import WorkerPlan
from tests.unit.supervisor.programs import BEATS, HEAD, program

pytestmark = pytest.mark.anyio

QUICK = RestartRule(first_s=0.02, longest_s=0.1, limit=3, within_s=60)
BEAT = HealthRule(beat_s=0.1, silent_s=0.8, deaf_s=5)


class Stage:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.events: list[str] = []
        self.changed = asyncio.Event()
        self.supervisor: Supervisor

    def said(self, text: str) -> bool:
        return any(text in one for one in self.events)

    async def until(self, check) -> None:
        with anyio.fail_after(30):
            while not check():
                self.changed.clear()
                await self.changed.wait()

    def line(self, name: str, line: str) -> None:
        self.lines.append((name, line))
        self.changed.set()

    def event(self, text: str) -> None:
        self.events.append(text)
        self.changed.set()


@asynccontextmanager
async def stage(**options) -> AsyncIterator[Stage]:
    made = Stage()
    async with supervised(
        on_line=made.line,
        on_event=made.event,
        on_change=made.changed.set,
        **options,
    ) as made.supervisor:
        yield made


def plan(name: str = "a", code: str = BEATS, **more) -> WorkerPlan:
    environment = more.pop("environment", {})
    known = {"restart": QUICK, "health": BEAT, "drain_s": 1.0, "ready_s": 10.0}
    return WorkerPlan(spec=program(name, code, **environment), **{**known, **more})


async def ready_again(made: Stage, name: str, pid: int) -> int:
    supervisor = made.supervisor
    await made.until(lambda: supervisor.states[name] is PlaceState.READY and supervisor[name].pid != pid)
    return supervisor[name].pid


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_one_that_is_killed_is_started_again():
    async with stage() as made:
        await made.supervisor.start([plan()])
        pid = made.supervisor["a"].pid
        os.kill(pid, signal.SIGKILL)
        assert await ready_again(made, "a", pid) != pid
        assert made.said("a was ended by SIGKILL; it is started again in 0.0 s")
        assert made.supervisor.status()[0]["restarts"] == 1


async def test_one_that_is_ended_by_a_signal_without_a_name_is_started_again():
    async with stage() as made:
        await made.supervisor.start([plan()])
        pid = made.supervisor["a"].pid
        os.kill(pid, signal.SIGRTMIN + 1)
        assert await ready_again(made, "a", pid) != pid
        assert made.said(f"a was ended by signal {signal.SIGRTMIN + 1}; it is started again")


async def test_a_child_that_holds_its_output_keeps_nobody_waiting_and_ends_with_it():
    code = "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nprint(child.pid, flush=True)\n"
    async with stage() as made:
        await made.supervisor.start([plan(code=code + BEATS)])
        await made.until(lambda: made.lines)
        child, pid = int(made.lines[0][1]), made.supervisor["a"].pid
        os.kill(pid, signal.SIGKILL)
        with anyio.fail_after(30):
            await ready_again(made, "a", pid)
            while alive(child):  # noqa: ASYNC110 - another process
                await anyio.sleep(0.02)


async def test_what_is_no_word_of_a_worker_ends_that_worker_alone():
    nonsense = "os.write(fd, b'\\xff' * 5000)\ntime.sleep(60)\n"
    async with stage() as made:
        with pytest.raises(WorkerError, match="never ran for"):
            await made.supervisor.start([plan("b"), plan(code=nonsense)])
        assert made.supervisor.states == {"b": PlaceState.READY, "a": PlaceState.GIVEN_UP}


async def test_a_restart_that_is_under_way_ends_when_all_are_told_to():
    """The first one has been replaced, and still ends."""
    code = "def stop(*_):\n    time.sleep(0.5)\n    os._exit(0)\nsignal.signal(signal.SIGTERM, stop)\n"
    async with stage() as made, anyio.create_task_group() as group:
        await made.supervisor.start([plan(code=code + BEATS, replicas=2)])
        refused = []

        async def roll() -> None:
            try:
                await made.supervisor.roll()
            except WorkerError as error:
                refused.append(str(error))

        first = made.supervisor["a/1"].pid
        group.start_soon(roll)
        await ready_again(made, "a/1", first)
        made.supervisor.drain()
        with anyio.fail_after(30):
            await made.supervisor.until_all_have_ended()
        assert set(made.supervisor.states.values()) == {PlaceState.DRAINED}
    assert refused == ["all were told to end"]


async def test_replicas_have_places_of_their_own_and_end_in_order():
    async with stage() as made:
        await made.supervisor.start([plan(replicas=2), plan("b")])
        assert list(made.supervisor.states) == ["a/1", "a/2", "b"]
        pids = [one.pid for one in made.supervisor.all]
    assert not any(alive(pid) for pid in pids)
    assert made.lines.count(("a/1", "stopped")) == 1


async def test_one_that_can_not_start_is_given_up_after_so_many_times():
    async with stage() as made:
        with pytest.raises(WorkerError, match="it ended 4 times and never ran for 60 s"):
            await made.supervisor.start([plan(code="print('no database'); sys.exit(1)")])
        assert made.supervisor.states["a"] is PlaceState.GIVEN_UP
        assert len([one for one in made.events if "no database" in one]) == 4
        with anyio.fail_after(30):
            await made.supervisor.until_nobody_works()


async def test_a_wrong_configuration_is_given_up_at_once():
    async with stage() as made:
        with pytest.raises(WorkerError, match="its configuration is wrong"):
            await made.supervisor.start([plan(code="sys.exit(2)")])
        assert made.supervisor.status()[0]["restarts"] == 0


async def test_where_starting_is_strict_the_first_failure_is_the_last():
    async with stage(strict=True) as made:
        with pytest.raises(WorkerError, match=r"(?s)exit code 1 instead of becoming ready.*no database"):
            await made.supervisor.start([plan(code="print('no database'); sys.exit(1)")])
        await made.until(lambda: made.supervisor.states["a"] is PlaceState.DRAINED)


async def test_one_whose_loop_hangs_is_killed_and_started_again(tmp_path):
    once = f"ready()\nif not os.path.exists('{tmp_path}/x'):\n    open('{tmp_path}/x', 'w')\n    beat()\n    time.sleep(60)\n"
    async with stage() as made:
        await made.supervisor.start([plan(code=once + BEATS)])
        await ready_again(made, "a", made.supervisor["a"].pid)
        assert made.said("a is killed: it has said nothing for 1 s: its event loop hangs")


async def test_why_one_was_killed_is_told_while_it_waits_for_its_restart():
    rule = RestartRule(first_s=60, longest_s=60)
    async with stage() as made:
        hung = "ready()\nbeat()\ntime.sleep(60)\n"
        await made.supervisor.start([plan(code=hung, restart=rule)])
        await made.until(lambda: made.supervisor.states["a"] is PlaceState.WAITING)
        (told,) = made.supervisor.status()
        assert told["why"] == "a was killed: it has said nothing for 1 s: its event loop hangs"


@pytest.mark.parametrize(
    ("beats", "rule", "why"),
    [
        ("beat(resident=99 * 2**20)", {"recycle": RecycleRule(memory_mb=64)}, "it uses 99 MB"),
        ("beat(handled=7)", {"recycle": RecycleRule(tasks=5)}, "it has handled 7 requests"),
        ("beat(idle_s=9.0)", {}, "it has asked for no task for 9 s"),
        ("beat()", {"recycle": RecycleRule(after_s=0.2)}, "it has run for 0 s"),
    ],
)
async def test_one_that_is_due_is_replaced_and_ends_when_the_fresh_one_is_ready(tmp_path, beats, rule, why):
    """The second one is well: how the first one is told to it by a file."""
    code = (
        f"first = not os.path.exists('{tmp_path}/x')\nopen('{tmp_path}/x', 'w')\nready()\n"
        f"while True:\n    {beats} if first else beat()\n    time.sleep(every)\n"
    )
    async with stage() as made:
        await made.supervisor.start([plan(code=code, **rule)])
        first = made.supervisor["a"]
        await ready_again(made, "a", first.pid)
        assert made.said(f"a is replaced by a fresh worker: {why}")
        await made.until(lambda: ("a", "stopped") in made.lines)
        assert not made.said("is started again")


async def test_a_replacement_that_fails_leaves_the_old_one(tmp_path):
    code = f"if os.path.exists('{tmp_path}/x'): sys.exit(1)\nopen('{tmp_path}/x', 'w')\n"
    async with stage() as made:
        await made.supervisor.start([plan(code=code + BEATS)])
        pid = made.supervisor["a"].pid
        with pytest.raises(WorkerError, match="a was not replaced: a ended with exit code 1"):
            await made.supervisor.restart("a")
        assert made.said("a goes on as it is, its replacement failed")
        assert (made.supervisor["a"].pid, alive(pid)) == (pid, True)


async def beaten(made: Stage, name: str, times: int) -> None:
    """Wait for so many more beats of a worker, each of which its supervisor acts on."""
    for _ in range(times):
        beat = made.supervisor[name].beat
        with anyio.fail_after(30):
            while made.supervisor[name].beat is beat:  # noqa: ASYNC110 - another process
                await anyio.sleep(0.02)


@pytest.mark.parametrize(("longest_s", "again"), [(60, False), (0.05, True)])
async def test_a_replacement_that_failed_is_tried_again_after_the_longest_pause(tmp_path, longest_s, again):
    code = f"if os.path.exists('{tmp_path}/x'): sys.exit(1)\nopen('{tmp_path}/x', 'w')\n"
    rule = RestartRule(first_s=0.02, longest_s=longest_s)
    async with stage() as made:
        recycled = plan(code=code + BEATS, restart=rule, recycle=RecycleRule(after_s=0.2))
        await made.supervisor.start([recycled])
        await made.until(lambda: made.said("a goes on as it is, its replacement failed"))
        if again:
            await made.until(lambda: sum("a is replaced by" in one for one in made.events) > 1)
        else:
            await beaten(made, "a", 5)
            assert sum("a is replaced by" in one for one in made.events) == 1


async def test_without_descriptors_for_a_replacement_the_old_one_goes_on(monkeypatch):
    def no_pipe():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with stage() as made:
        await made.supervisor.start([plan()])
        pid = made.supervisor["a"].pid
        monkeypatch.setattr("agentweave_bus.supervisor.worker_process.os.pipe", no_pipe)
        with pytest.raises(WorkerError, match="a was not replaced: a can't be started: Too many open files"):
            await made.supervisor.restart("a")
        monkeypatch.undo()
        assert (made.supervisor["a"].pid, made.supervisor.states["a"]) == (pid, PlaceState.READY)
        assert alive(pid)


async def test_rolling_replaces_every_worker_and_follows_new_plans():
    async with stage() as made:
        await made.supervisor.start([plan(replicas=2), plan("b"), plan("gone")])
        before = {one.pid for one in made.supervisor.all}
        said = "print('new', flush=True)\n"
        with anyio.fail_after(30):
            await made.supervisor.roll([plan(replicas=3, code=said + BEATS), plan("b"), plan("c")])
        await made.until(lambda: set(made.supervisor.states.values()) == {PlaceState.READY})
        assert list(made.supervisor.states) == ["a/1", "a/2", "b", "a/3", "c"]
        assert not before & {one.pid for one in made.supervisor.all}
        assert not any(alive(pid) for pid in before)
        assert {name for name, line in made.lines if line == "new"} == {"a/1", "a/2", "a/3"}


async def test_scaling():
    async with stage() as made:
        await made.supervisor.start([plan(replicas=2)])
        made.supervisor.scale("a", 3)
        await made.until(lambda: list(made.supervisor.states.values()) == [PlaceState.READY] * 3)
        pids = [one.pid for one in made.supervisor.all]
        made.supervisor.scale("a", 1)
        assert list(made.supervisor.states) == ["a/1"]
        await made.until(lambda: {name for name, line in made.lines if line == "stopped"} == {"a/2", "a/3"})
        assert alive(pids[0])
        with pytest.raises(AgentWeaveError, match="at least one worker"):
            made.supervisor.scale("a", 0)
        with pytest.raises(AgentWeaveError, match="no agent 'x' here, but: a"):
            made.supervisor.scale("x", 1)


async def test_the_workers_of_an_agent_are_told_one_after_the_other():
    async with stage() as made:
        await made.supervisor.start([plan(replicas=9), plan("b")])
        made.supervisor.scale("a", 11)
        made.supervisor.scale("b", 2)
        told = [one["name"] for one in made.supervisor.status()]
        assert told == [*(f"a/{number}" for number in range(1, 12)), "b", "b/1"]


async def test_who_still_ends_is_known_until_it_has(tmp_path):
    """One that was replaced and one whose place was given up finish what they were doing."""
    code = (
        f"def stop(*_):\n    while not os.path.exists('{tmp_path}/x'): time.sleep(0.02)\n    os._exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
    )
    async with stage() as made, anyio.create_task_group() as group:
        await made.supervisor.start([plan(replicas=2, code=code + BEATS, drain_s=30)])
        assert made.supervisor.leaving() == frozenset()
        one, two = (each.pid for each in made.supervisor.all)
        group.start_soon(made.supervisor.restart, "a")
        await ready_again(made, "a/1", one)
        assert made.supervisor.leaving() == {("a", one)}
        made.supervisor.scale("a", 1)
        assert made.supervisor.leaving() == {("a", one), ("a", two)}
        (tmp_path / "x").touch()
        await made.until(lambda: not made.supervisor.leaving())
        assert not alive(one)
        assert not alive(two)


SLOW = RestartRule(first_s=60, longest_s=60)


async def test_one_that_waits_for_its_restart_is_drained_at_once():
    async with stage() as made:
        await made.supervisor.start([plan(restart=SLOW)])
        made.supervisor["a"].kill()
        await made.until(lambda: made.supervisor.states["a"] is PlaceState.WAITING)
        made.supervisor.drain()
        with anyio.fail_after(30):
            await made.supervisor.until_all_have_ended()


async def test_one_that_is_starting_is_drained_at_once():
    async with stage() as made, anyio.create_task_group() as group:
        group.start_soon(made.supervisor.start, [plan(code="print('here', flush=True)\ntime.sleep(60)\n")])
        await made.until(lambda: ("a", "here") in made.lines)
        made.supervisor.drain()
        with anyio.fail_after(30):
            await made.supervisor.until_all_have_ended()
        group.cancel_scope.cancel()


async def test_one_whose_process_is_not_there_yet_is_drained_at_once():
    async with stage() as made, anyio.create_task_group() as group:
        group.start_soon(made.supervisor.start, [plan(code="time.sleep(60)\n", ready_s=60.0)])
        while not made.supervisor.all:
            await anyio.lowlevel.checkpoint()
        assert not made.supervisor["a"].started
        made.supervisor.drain()
        with anyio.fail_after(30):
            await made.supervisor.until_all_have_ended()
        group.cancel_scope.cancel()


@pytest.mark.parametrize("takes_s", [0.5, 60.0])
async def test_one_that_is_being_replaced_is_drained_with_its_replacement(tmp_path, takes_s):
    """The second one takes a while to be ready; told to end meanwhile, both do, and at once."""
    code = (
        f"if os.path.exists('{tmp_path}/x'):\n    print('second', flush=True)\n    time.sleep({takes_s})\n"
        f"open('{tmp_path}/x', 'w')\n"
    )
    async with stage() as made, anyio.create_task_group() as group:
        await made.supervisor.start([plan(code=code + BEATS, ready_s=60.0)])
        first = made.supervisor["a"].pid

        async def restart() -> None:
            with pytest.raises(WorkerError, match="a was not replaced: it was told to end"):
                await made.supervisor.restart("a")

        group.start_soon(restart)
        await made.until(lambda: ("a", "second") in made.lines)
        made.supervisor.drain()
        with anyio.fail_after(30):
            await made.supervisor.until_all_have_ended()
        assert not alive(made.supervisor["a"].pid)
        await made.until(lambda: made.lines.count(("a", "stopped")) == 2)
        with anyio.fail_after(30):
            while alive(first):  # noqa: ASYNC110 - another process
                await anyio.sleep(0.02)
        assert not made.said("goes on as it is")


async def test_a_drained_worker_stays_down_until_it_is_restarted():
    async with stage() as made:
        await made.supervisor.start([plan()])
        made.supervisor.drain("a")
        await made.until(lambda: made.supervisor.states["a"] is PlaceState.DRAINED)
        assert ("a", "stopped") in made.lines
        with anyio.fail_after(30):
            await made.supervisor.restart("a")
        assert made.supervisor.states["a"] is PlaceState.READY


@pytest.mark.skipif(os.getuid() != 0, reason="only root starts a worker as somebody else")
async def test_a_worker_runs_as_the_user_of_its_plan():
    user = 65534
    try:
        subprocess.run([sys.executable, "-S", "-c", ""], user=user, check=True)  # noqa: ASYNC221
    except PermissionError:
        user = 0  # this interpreter lies where only root may look
    spec = dataclasses.replace(
        program("a", "print(os.getuid(), os.getgid(), os.getgroups(), flush=True)\n" + BEATS),
        user=user,
        group=65533,
    )
    async with stage() as made:
        await made.supervisor.start([dataclasses.replace(plan(), spec=spec)])
        said = {("a", f"{user} 65533 {groups}") for groups in ([], [65533])}
        await made.until(lambda: bool(said & set(made.lines)))


@pytest.mark.skipif(os.getuid() == 0, reason="root may start it")
async def test_who_is_not_root_can_not_start_one_as_somebody_else():
    async with stage(strict=True) as made:
        with pytest.raises(WorkerError, match="can't be started as user 0"):
            await made.supervisor.start(
                [dataclasses.replace(plan(), spec=dataclasses.replace(plan().spec, user=0))]
            )


async def test_a_kill_ends_the_wait_for_those_who_do_not_stop():
    stubborn = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    with anyio.fail_after(30):
        async with stage() as made:
            await made.supervisor.start([plan(code=stubborn + BEATS, drain_s=60.0)])
            asyncio.get_running_loop().call_later(0.3, made.supervisor.kill)


def test_its_workers_die_with_a_supervisor_that_is_killed():
    code = (
        "import asyncio, sys\n"
        "from agentweave_bus.supervisor.supervisor import supervised\n"
        "from tests.unit.supervisor.test_supervisor import plan\n"
        "async def main():\n"
        "    async with supervised(on_line=print, on_event=print) as one:\n"
        "        await one.start([plan(replicas=2)])\n"
        "        print(*(process.pid for process in one.all), flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 2
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_programs_of_these_tests_are_python():
    compile(HEAD + BEATS, "program", "exec")


def by_load(tmp_path, **rule) -> WorkerPlan:
    """Workers that tell a backlog which the test writes into a file."""
    (tmp_path / "backlog").write_text("0")
    code = f"time.sleep(0.3)\nready()\nwhile True:\n    beat(backlog=int(open('{tmp_path}/backlog').read() or 0))\n    time.sleep(every)\n"
    patient = HealthRule(beat_s=0.1, silent_s=10, deaf_s=10)  # none of them misbehaves
    return plan(code=code, scale=ScaleRule(1, 4, backlog=10, **rule), health=patient, drain_s=20.0)


async def test_nobody_is_killed_for_being_silent_while_the_whole_machine_stood_still(monkeypatch):
    monkeypatch.setattr(place, "_LATE_S", 1.0)
    async with stage() as made:
        await made.supervisor.start([plan()])
        pid, before = made.supervisor["a"].pid, made.supervisor["a"].beat
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)  # noqa: ASYNC251 - nobody gets to anything
        os.kill(pid, signal.SIGCONT)
        with anyio.fail_after(30):
            while made.supervisor["a"].beat is before:  # noqa: ASYNC110 - another process
                await anyio.sleep(0.02)
        assert not made.said("is killed")
        assert made.supervisor["a"].pid == pid


async def test_there_are_as_many_workers_as_the_backlog_calls_for(tmp_path):
    async with stage() as made:
        await made.supervisor.start([by_load(tmp_path, cool_down_s=0.3)])
        assert list(made.supervisor.states) == ["a/1"]
        (tmp_path / "backlog").write_text("33")
        await made.until(lambda: made.said("a: 4 workers instead of 2"))
        assert made.supervisor.states["a/2"] is PlaceState.READY  # it was waited for
        await made.until(lambda: list(made.supervisor.states.values()) == [PlaceState.READY] * 4)
        assert made.said("a: 2 workers instead of 1: 33 tasks wait, 0 requests are worked on")
        assert made.said("a: 4 workers instead of 2: 33 tasks wait")
        (agent,) = made.supervisor.agents()
        assert agent == {
            "agent": "a", "workers": 4, "backlog": 33, "min": 1, "max": 4, "wanted": 4, "held": False,
        }  # fmt: skip
        (tmp_path / "backlog").write_text("0")
        await made.until(lambda: list(made.supervisor.states) == ["a/1"])
        await made.until(
            lambda: {name for name, said in made.lines if said == "stopped"} == {"a/2", "a/3", "a/4"}
        )
        assert [one for one in made.events if "instead of" in one][2:] == [
            f"a: {more} instead of {count}: 0 tasks wait, 0 requests are worked on"
            for more, count in (("3 workers", 4), ("2 workers", 3), ("1 worker", 2))
        ]


async def test_no_more_are_added_while_those_that_were_added_can_not_start(tmp_path):
    code = (
        f"if os.path.exists('{tmp_path}/x'): sys.exit(1)\nopen('{tmp_path}/x', 'w')\n"
        "ready()\nwhile True:\n    beat(backlog=400)\n    time.sleep(every)\n"
    )
    async with stage() as made:
        rule = RestartRule(first_s=60, longest_s=60)
        await made.supervisor.start([plan(code=code, restart=rule, scale=ScaleRule(1, 8))])
        await made.until(lambda: made.supervisor.states.get("a/2") is PlaceState.WAITING)
        await beaten(made, "a/1", 4)
        assert list(made.supervisor.states) == ["a/1", "a/2"]


async def test_their_number_stays_while_they_are_rolled(tmp_path):
    scaled = by_load(tmp_path)
    held = f"while os.path.exists('{tmp_path}/hold'): time.sleep(0.02)\n"
    slow = dataclasses.replace(scaled, spec=program("a", held + scaled.spec.class_path), ready_s=60.0)
    async with stage() as made:
        await made.supervisor.start([slow])
        (tmp_path / "hold").touch()
        async with anyio.create_task_group() as group:
            group.start_soon(made.supervisor.roll)
            await made.until(lambda: made.said("a/1 is replaced by a fresh worker"))
            (tmp_path / "backlog").write_text("33")
            await beaten(made, "a/1", 4)
            assert not made.said("instead of")
            (tmp_path / "hold").unlink()
        await made.until(lambda: made.said("a: 4 workers instead of 2"))


async def test_a_number_that_somebody_chose_stays_until_told_otherwise(tmp_path):
    async with stage() as made:
        scaled = by_load(tmp_path, cool_down_s=0.1)
        await made.supervisor.start([scaled, plan("b")])
        made.supervisor.scale("a", 2)
        assert made.said("a: 2 workers instead of 1, as asked for")
        (tmp_path / "backlog").write_text("40")
        with anyio.fail_after(30):
            while made.supervisor.agents()[0]["wanted"] != 4:  # noqa: ASYNC110 - another process
                await anyio.sleep(0.02)
        told = made.supervisor.agents()[0]
        assert (told["workers"], told["held"], list(made.supervisor.states)) == (2, True, ["a/1", "b", "a/2"])
        for count in (0, 5):
            with pytest.raises(AgentWeaveError, match=r"at least one|may have 1 to 4 workers, not 5"):
                made.supervisor.scale("a", count)
        with pytest.raises(AgentWeaveError, match="b has no min and max"):
            made.supervisor.scale("b", None)
        made.supervisor.scale("a", None)
        await made.until(lambda: made.supervisor.agents()[0]["workers"] == 4)
        made.supervisor.scale("a", 3)
        with anyio.fail_after(30):
            await made.supervisor.roll([scaled, plan("b")])
        await made.until(lambda: made.supervisor.agents()[0]["workers"] == 4)


async def test_who_was_told_to_end_gets_no_company(tmp_path):
    async with stage() as made:
        await made.supervisor.start([by_load(tmp_path)])
        stubborn = made.supervisor["a/1"]
        (tmp_path / "backlog").write_text("40")
        made.supervisor.drain()
        with anyio.fail_after(30):
            await made.supervisor.until_all_have_ended()
        assert not stubborn.running
        assert list(made.supervisor.states) == ["a/1"]


async def test_replicas_that_are_due_at_once_are_recycled_one_after_the_other(tmp_path):
    """Each takes a while to be ready; meanwhile no other one is replaced."""
    code = "time.sleep(0.3)\nopen(os.environ['LOG'], 'a').write('x')\n"
    async with stage() as made:
        log = tmp_path / "log"
        three = plan(
            code=code + BEATS, replicas=3, recycle=RecycleRule(after_s=1.0), environment={"LOG": str(log)}
        )
        await made.supervisor.start([three])
        before = [one.pid for one in made.supervisor.all]
        most = 0

        def all_replaced() -> bool:
            nonlocal most
            most = max(most, sum(place.replacing for place in made.supervisor._places.values()))
            return all(one.started and one.pid not in before for one in made.supervisor.all)

        await made.until(all_replaced)
        assert most == 1
