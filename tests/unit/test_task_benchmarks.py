"""What the benchmarks of durable tasks make of their measurements: ratios, verdicts, tables, counts, stamps."""

from __future__ import annotations

import asyncio
import json
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest

from benchmarks import documents
from benchmarks.durable import plot
from benchmarks.durable.instructions import TaskInstructions, task_instructions_table
from benchmarks.durable.large import LengthSample, LongRun, large_report
from benchmarks.durable.report import (
    cancels_line,
    task_figures_table,
    task_ratios_tables,
    task_targets_table,
)
from benchmarks.durable.results import TaskSample, rounds_of
from benchmarks.durable.rows import IDLE, ONE, TASK_ROWS, USUAL, chosen
from benchmarks.durable.run import Counts, Turn, compare_tasks
from benchmarks.durable.stamps import StampReader, StampWriter, stamped
from benchmarks.durable.targets import judge_tasks, room_for_second
from benchmarks.durable.world import TaskWorld
from benchmarks.memory import MemorySample, memory_report
from benchmarks.places import PAYLOAD_BYTES
from benchmarks.plot import OTHERS, OURS


def sample(**changed):
    found = TaskSample(
        submitted=1000.0,
        through=500.0,
        worked=800.0,
        worked_by_two=1300.0,
        start_p50_us=2000.0,
        start_p99_us=9000.0,
        cpu_us={"client": 100.0, "worker": 200.0, "broker": 50.0},
        resident=100_000_000,
        processors=2,
    )
    return replace(found, **changed)


def run_of(**ours):
    """Return a run of one round in which every target is just met, but for what is changed of ours."""
    just = {"submitted": 1000.0, "through": 500.0, "worked": 800.0, "worked_by_two": 1152.1}
    return {
        "jetstream": [sample(submitted=5000.0, through=4000.0, worked=5000.0)],
        "tasks": [sample(**{**just, "cancels_ms": [199.0], **ours})],
        "taskiq": [sample(through=500.0, worked=5000.0)],
        "taskiq-results": [sample(through=499.0)],
    }


def test_targets_that_are_just_met_are_met():
    assert [verdict.met for verdict in judge_tasks(run_of())] == [True] * 6
    assert "NOT met" not in task_targets_table(run_of())


@pytest.mark.parametrize(
    ("changed", "which"),
    [
        ({"submitted": 999.0}, [0]),
        ({"through": 499.5}, [1, 2]),
        ({"worked_by_two": 1151.9}, [4]),
        ({"cancels_ms": [100.0, 200.0, 300.0]}, [5]),
    ],
)
def test_each_target_is_judged_by_its_own_figure_and_on_the_right_side(changed, which):
    missed = [number for number, verdict in enumerate(judge_tasks(run_of(**changed))) if not verdict.met]
    assert missed == which
    assert task_targets_table(run_of(**changed)).count("NOT met") == len(which)


def test_end_to_end_is_held_against_how_fast_jetstream_works_off_a_full_queue():
    found = run_of()
    found["jetstream"] = [sample(submitted=5000.0, through=1.0, worked=5001.0)]
    assert [verdict.met for verdict in judge_tasks(found)][1] is False


@pytest.mark.parametrize(
    ("processors", "broker", "room"),
    [
        (2, 50.0, 1.6),  # two workers and the broker share them
        (2, 200.0, 1.0),  # the broker needs one by itself
        (2, 300.0, 1.0),  # there is none to spare
        (1, 50.0, 1.0),
        (3, 50.0, 2.0),  # never more than twice
        (64, 50.0, 2.0),
    ],
)
def test_a_second_worker_is_held_against_what_the_processors_leave_beside_the_broker(
    processors, broker, room
):
    cpu = {"client": 100.0, "worker": 200.0, "broker": broker}
    one = sample(worked=1000.0, worked_by_two=1000.0 * room, cpu_us=cpu, processors=processors)
    assert room_for_second(one) == pytest.approx(room)
    for share, met in ((0.91, True), (0.89, False)):
        changed = {"cpu_us": cpu, "processors": processors, "worked_by_two": 800.0 * room * share}
        verdict = list(judge_tasks(run_of(**changed)))[4]
        assert (verdict.met, verdict.found.median) == (met, pytest.approx(share))
        assert f"two workers ({room * share:.2f} x one)" in verdict.wanted
        assert f"{processors} processors leave beside the broker ({room:.2f} x one)" in verdict.wanted


def test_a_second_worker_is_judged_round_by_round():
    busy = sample(worked=400.0, worked_by_two=640.0 * 0.95)
    found = {"tasks": [sample(worked_by_two=800.0), busy, busy]}
    (verdict,) = judge_tasks(found)
    assert verdict.met
    assert (verdict.found.low, verdict.found.median) == (pytest.approx(0.625), pytest.approx(0.95))


def test_targets_without_their_rows_are_left_out():
    assert task_targets_table({"jetstream": [sample()]}) == ""
    assert len(list(judge_tasks({"tasks": [sample()]}))) == 1, "its two workers"


def test_the_tables_name_each_row_with_the_spread_of_its_rounds():
    found = {"jetstream": [sample(), sample(), sample()], "tasks": [sample(through=t) for t in (90, 80, 100)]}
    figures = task_figures_table(found)
    assert "90 (80 to 100)" in figures
    assert "durable tasks" in figures
    (ratios,) = task_ratios_tables(found)
    assert ratios.startswith("| times JetStream of nats-py over mTLS |")
    assert "0.18 (0.16 to 0.20)" in ratios


def test_cancellations_are_told_over_all_rounds():
    found = {"tasks": [sample(cancels_ms=[1.0, 5.0]), sample(cancels_ms=[3.0])]}
    assert "after 3.0 ms (median of 3; 1.0 to 5.0 ms)" in cancels_line(found)
    assert cancels_line({"jetstream": [sample()]}) == ""


def test_results_survive_json():
    found = {"tasks": [sample(cancels_ms=[1.0])]}
    assert rounds_of(json.loads(json.dumps({"tasks": [asdict(one) for one in found["tasks"]]}))) == found


def test_a_measurement_takes_as_many_tasks_as_last_about_as_long():
    counts = Counts.after(sample(submitted=30_000.0, through=10.0, worked=1e9), 1.5)
    assert (counts.submitted, counts.worked_by_two) == (45_000, 1950)
    assert counts.through == 200, "never too few to say anything"
    assert counts.worked == 100_000, "never more than a queue should hold"


def long_run(*, worked=800.0, queued=1_000_000):
    return LongRun(
        wanted=1_000_000,
        queued=queued,
        filled_s=300.0,
        megabytes=2500.0,
        short=[LengthSample(1000.0, 1000.0)] * 3,
        long=[LengthSample(900.0, worked)] * 3,
    )


def test_a_long_queue_may_be_a_fifth_slower():
    assert large_report(long_run()).count("| met") == 2
    slow = large_report(long_run(worked=799.0))
    assert slow.count("NOT met") == 1
    assert "one worker: with 1,000,000 queued" in slow


def test_a_queue_that_could_not_be_filled_in_time_is_told():
    assert "time was up" not in large_report(long_run())
    assert "The time was up before 1,000,000 were queued" in large_report(long_run(queued=400_000))


def test_a_long_run_survives_json():
    assert LongRun.from_json(json.loads(json.dumps(asdict(long_run())))) == long_run()


def test_memory_is_told_of_tasks():
    samples = [MemorySample(n * 1000, 90, 80) for n in range(1, 101)]
    told = memory_report(samples, 200_000, "tasks")
    assert told.startswith("| tasks")
    assert "100,000 of 200,000 tasks" in told


@pytest.mark.anyio
async def test_stamps_say_how_long_ago_a_payload_was_made(tmp_path):
    path = str(tmp_path / "stamps")
    reader = StampReader(path)
    text = stamped()
    assert len(text) == PAYLOAD_BYTES
    await asyncio.sleep(0.01)
    writer = StampWriter(path)
    writer.since(text)
    (nanoseconds,) = await reader.next(1, 30.0)
    assert 10_000_000 <= nanoseconds < 30_000_000_000
    writer.now()
    reader.skip()
    with pytest.raises(TimeoutError):
        await reader.next(1, 0.02)


@pytest.mark.anyio
async def test_a_line_that_is_not_whole_yet_is_left_for_the_next_look(tmp_path):
    path = tmp_path / "stamps"
    path.write_text("1\n2")
    reader = StampReader(str(path))
    assert await reader.next(1, 30.0) == [1]
    path.write_text("1\n23\n")
    assert await reader.next(1, 30.0) == [23]


def test_instructions_are_shown_as_times_the_first_row():
    cycles = {"client_cycles": 100_000, "worker_cycles": 1_000_000}
    found = {
        "jetstream": TaskInstructions(client=170_000, worker=165_400, broker=53_000, **cycles),
        "tasks": TaskInstructions(client=640_000, worker=2_030_000, broker=254_000, **cycles),
    }
    raw, ours = (
        [cell.strip() for cell in line.split("|")]
        for line in task_instructions_table(found).splitlines()[-2:]
    )
    assert raw[2:-1] == ["170", "165", "335", "1.0", "53", "1.7", "0.2"]
    assert ours[2:-1] == ["640", "2,030", "2,670", "8.0", "254", "6.4", "2.0"]


def test_rows_are_chosen_by_name():
    assert [row.name for row in chosen("tasks,jetstream")] == ["jetstream", "tasks"]
    assert [row.name for row in chosen(USUAL)] == ["jetstream", "tasks", "taskiq", "taskiq-results"]
    assert [row.name for row in chosen("floor")] == ["floor"]
    with pytest.raises(ValueError, match="no such row of tasks: celery;"):
        chosen("celery")


def test_the_document_has_a_place_for_each_part_and_explains_each_row():
    text = documents.DOCUMENT.read_text()
    for part in ("tasks", "large", "memory-tasks", "instructions-tasks"):
        documents.replace_part(text, part, "")
    for row in TASK_ROWS:
        assert f"\n| {row.title} | " in text, row.name


class Axes:
    """Notes what is drawn: matplotlib is in the benchmarks' environment only."""

    def __init__(self):
        self.drawn = {}
        self.spines = self.xaxis = self

    def __getitem__(self, _names):
        return self

    def __getattr__(self, name):
        return lambda *args, **named: self.drawn.setdefault(name, []).append((args, named))


def test_the_picture_has_each_row_that_was_measured_and_ours_in_its_colour(monkeypatch, tmp_path):
    panels, titles = [Axes() for _ in range(4)], []

    @contextmanager
    def picture(path, rows, _caption):
        assert path == tmp_path / "picture.svg"
        titles.extend(rows)
        yield panels

    monkeypatch.setattr(plot, "picture", picture)
    plot.draw_tasks(
        {"tasks": [sample(), sample(submitted=3000.0)], "jetstream": [sample()] * 2}, tmp_path / "picture.svg"
    )
    assert titles == ["JetStream of nats-py over mTLS", "durable tasks"]
    drawn = [one.drawn["barh"] for one in panels]
    assert [args[1] for ((args, _),) in drawn] == [[1000, 2000], [500, 500], [2000, 2000], [200, 200]]
    assert {tuple(named["color"]) for ((_, named),) in drawn} == {(OTHERS, OURS)}
    assert "End to end" in panels[1].drawn["set_title"][0][0][0]


@pytest.mark.slow
@pytest.mark.anyio
async def test_rows_of_tasks_are_measured_side_by_side():
    found = await compare_tasks(chosen("jetstream,floor,tasks"), rounds=1, seconds=0.1)
    assert set(found) == {"jetstream", "floor", "tasks"}
    for (one,) in found.values():
        assert min(one.submitted, one.through, one.worked, one.worked_by_two) > 10
        assert 0 < one.start_p50_us <= one.start_p99_us
    (ours,) = found["tasks"]
    assert ours.cpu_us["worker"] > found["jetstream"][0].cpu_us["worker"]
    assert len(ours.cancels_ms) > 1


@pytest.mark.slow
@pytest.mark.anyio
async def test_the_floor_stores_two_records_of_each_task(tmp_path):
    (row,) = chosen("floor")
    async with TaskWorld(tmp_path, [row], queues={ONE: 1}, closed=()).contenders() as (contender,):
        await Turn(contender).through(ONE, 150)
        states = await contender.queues[ONE].broker.stream_info("floor-one-states")
        assert states.state.messages == 2 * 151, "one more is what the client tried itself with"


@pytest.mark.slow
@pytest.mark.anyio
async def test_a_worker_works_only_while_its_gate_is_open(tmp_path):
    (row,) = chosen("tasks")
    async with TaskWorld(tmp_path, [row], queues={IDLE: 1, ONE: 1}).contenders() as (contender,):
        turn, idle = Turn(contender), contender.queues[IDLE]
        assert await idle.waiting() == 1, "what the client tried itself with"
        await turn.submitted(IDLE, 150)
        await asyncio.sleep(0.3)
        assert await idle.waiting() == 151
        assert await contender.queues[ONE].waiting() == 0
        _, done = await turn.worked(idle, leave=20)
        assert done == 131
        await idle.down_to(0, 10.0)
