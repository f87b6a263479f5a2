"""What benchmarks make of their measurements: medians, ratios, verdicts, tables, the picture, the document."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict

import msgpack
import pytest
from cryptography.exceptions import InvalidSignature

from agentweave_bus.testing.trust import TrustDomain
from benchmarks import documents, machine
from benchmarks.gauges import cpu_seconds, resident_bytes
from benchmarks.instructions import Instructions, instructions_table
from benchmarks.load import Load, Sample, closed_loop, percentile
from benchmarks.memory import MemorySample, growth_of, memory_report
from benchmarks.peers import WrongAnswerError
from benchmarks.peers.floor import Opener, Sealer, now_milliseconds
from benchmarks.places import Place
from benchmarks.plot import bars
from benchmarks.report import failures_list, figures_table, ratios_tables, stages_table, table, targets_table
from benchmarks.results import Figure, StageFigure, figures_of, ratio, rounds_of
from benchmarks.rows import ROWS, chosen
from benchmarks.run import compare
from benchmarks.targets import at_64, judge, p50


def sample(*, p50_us=100.0, per_second=1000.0, memory_mb=50.0):
    return Sample(
        calls=int(per_second * 2),
        seconds=2.0,
        p50_us=p50_us,
        p99_us=3 * p50_us,
        cpu_us={"worker": 10.0, "client": 20.0, "broker": 5.0},
        resident={"worker": int(memory_mb * 1e6), "client": 1},
    )


def rounds(*medians, per_second=1000.0, memory_mb=50.0):
    """Return a row with one round for each sequential median."""
    return [
        {
            1: sample(p50_us=one, memory_mb=memory_mb),
            64: sample(per_second=per_second, memory_mb=memory_mb),
            256: sample(per_second=2 * per_second, memory_mb=memory_mb),
        }
        for one in medians
    ]


def test_a_percentile_is_a_value_that_occurred():
    ordered = list(range(1, 101))
    assert (percentile(ordered, 0.5), percentile(ordered, 0.99), percentile([7], 0.99)) == (50, 99, 7)
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_figures_are_medians_with_the_least_and_the_greatest_round():
    figures = figures_of(rounds(300, 100, 200))
    assert figures.p50 == Figure(200, 100, 300)
    assert figures.at_64.median == 1000
    assert figures.at_256.median == 2000
    assert figures.memory.median == 50


def test_a_ratio_is_taken_within_each_round():
    mine, raw = rounds(200, 400, 900), rounds(100, 200, 300)
    # The quotient of the medians would be 2 as well; its spread would not.
    assert ratio(mine, raw, p50) == Figure(2, 2, 3)
    with pytest.raises(ValueError, match="shorter"):
        ratio(mine, raw[:2], at_64)


def test_targets_are_judged_by_the_median_and_on_the_right_side():
    met = {"raw": rounds(100, 100), "safe": rounds(200, 200, per_second=350, memory_mb=109)}
    missed = {"raw": rounds(100, 100), "safe": rounds(201, 201, per_second=349, memory_mb=110)}
    assert [verdict.met for verdict in judge(met)] == [True, True, True]
    assert [verdict.met for verdict in judge(missed)] == [False, False, False]
    assert "NOT met" not in targets_table(met)
    assert targets_table(missed).count("NOT met") == 3


def test_targets_without_their_rows_are_left_out():
    assert list(judge({"raw": rounds(100)})) == []
    assert targets_table({"raw": rounds(100)}) == ""
    every = {row.name: rounds(100) for row in ROWS}
    assert len(list(judge(every))) == 9


def test_a_table_is_straight_and_is_markdown():
    lines = table(["name", "µs"], [["a", "1"], ["longer", "1,000"]]).splitlines()
    assert lines == [
        "| name   |    µs |",
        "|--------|------:|",
        "| a      |     1 |",
        "| longer | 1,000 |",
    ]


def test_the_tables_name_each_row_and_its_ratios():
    found = {"raw": rounds(100, 110), "safe": rounds(250, 260), "a2a": rounds(1000, 1100)}
    figures = figures_table(found)
    assert "safe, standing answer" in figures
    assert "255 (250 to 260)" in figures
    to_raw, to_a2a = ratios_tables(found)
    assert to_raw.startswith("| times nats-py over mTLS")
    assert "2.43 (2.36 to 2.50)" in to_raw
    assert to_a2a.startswith("| times a2a-sdk over plain HTTP")


def test_a_stage_without_batches_has_an_empty_cell():
    shown = stages_table(
        [
            StageFigure("seal", Figure(80, 70, 90), Figure(30, 20, 40)),
            StageFigure("validate", Figure(9, 8, 10)),
        ]
    )
    assert "| seal             | 80.0 (70.0 to 90.0) | 30.0 (20.0 to 40.0) |" in shown
    assert "| validate         |   9.0 (8.0 to 10.0) |                     |" in shown


def test_results_survive_json():
    found = {"raw": rounds(100, 110)}
    text = json.dumps({"raw": [{n: asdict(one) for n, one in each.items()} for each in found["raw"]]})
    assert rounds_of(json.loads(text)) == found
    stage = StageFigure("seal", Figure(80, 70, 90), Figure(30, 20, 40))
    assert StageFigure.from_json(json.loads(json.dumps(asdict(stage)))) == stage


def memory_samples(mb_per_100k):
    return [MemorySample(n * 10_000, 90 + mb_per_100k * n / 10, 80) for n in range(1, 101)]


def test_memory_that_grows_is_called_so():
    assert growth_of(memory_samples(0.1)).flat
    grown = growth_of(memory_samples(2.0))
    assert not grown.flat
    assert grown.mb_in_100k == pytest.approx(2.0)
    assert "memory is flat" in memory_report(memory_samples(0.1))
    assert "memory is NOT flat" in memory_report(memory_samples(2.0))


def test_a_memory_run_that_was_cut_short_says_so():
    assert "time was up" not in memory_report(memory_samples(0.1), 1_000_000)
    assert "time was up after 1,000,000 of 1,000,001 calls" in memory_report(memory_samples(0.1), 1_000_001)


def test_what_fills_up_at_first_is_no_growth():
    filling = [MemorySample(n * 10_000, 60 + 2 * min(n, 20), 80) for n in range(1, 101)]
    assert growth_of(filling).flat


class Axes:
    """Notes what is drawn: matplotlib is in the benchmarks' environment only."""

    def __init__(self):
        self.calls = {}

    def __getattr__(self, name):
        return lambda *args, **named: self.calls.setdefault(name, []).append((args, named))


def test_bars_show_the_median_and_whiskers_the_spread():
    axes = Axes()
    bars(axes, [0, 1], [Figure(10, 8, 15), Figure(20, 20, 20)], ["blue", "grey"], height=0.5)
    assert axes.calls["barh"] == [
        (([0, 1], [10, 20]), {"height": 0.5, "color": ["blue", "grey"], "alpha": 1.0})
    ]
    ((args, named),) = axes.calls["errorbar"]
    assert args == ([10, 20], [0, 1])
    assert named["xerr"] == [[2, 0], [5, 0]]
    assert [named["xytext"] for _, named in axes.calls["annotate"]] == [(4, 0), (4, 0)]
    assert [args[0] for args, _ in axes.calls["annotate"]] == ["10", "20"]


def test_a_part_of_the_document_is_replaced_and_nothing_else():
    before = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n"
    after = documents.replace_part(before, "x", "new")
    assert after == "a\n<!-- begin x -->\n\nnew\n\n<!-- end x -->\nb\n"
    assert documents.replace_part(after, "x", "new") == after
    begin, end = "<!-- begin x -->", "<!-- end x -->"
    for broken in ("no marks", end + begin, begin + begin + end, begin + end + end):
        with pytest.raises(ValueError, match="no single pair"):
            documents.replace_part(broken, "x", "new")


def test_instructions_are_shown_as_times_the_first_row():
    found = {"raw": Instructions(90_000, 160_000), "safe": Instructions(1_200_400, 1_050_000)}
    *_, raw, safe = instructions_table(found).splitlines()
    assert raw.split()[-8:] == ["90", "|", "160", "|", "250", "|", "1.0", "|"]
    assert safe.split()[-8:] == ["1,200", "|", "1,050", "|", "2,250", "|", "9.0", "|"]


def test_the_document_has_a_place_for_each_part_and_explains_each_row():
    text = documents.DOCUMENT.read_text()
    for part in ("comparison", "stages", "instructions", "memory"):
        documents.replace_part(text, part, "")
    for row in ROWS:
        assert f"\n| {row.title} | " in text, row.name
    assert f"({documents.PICTURE.name})" in text


def test_rows_are_chosen_by_name():
    assert [row.name for row in chosen("safe,raw")] == ["raw", "safe"]
    with pytest.raises(ValueError, match="no such row: fast;"):
        chosen("raw,fast")


@pytest.mark.anyio
async def test_the_load_counts_what_was_answered_in_its_time():
    in_flight, most, made = 0, 0, 0

    async def call():
        nonlocal in_flight, most, made
        in_flight, made = in_flight + 1, made + 1
        most = max(most, in_flight)
        await asyncio.sleep(0.5 if made == 40 else 0.01)
        in_flight -= 1

    found = await closed_loop(call, Load(tasks=5, warm_s=0.05, seconds=0.1), {"me": os.getpid()})
    assert most == 5
    assert in_flight == 0, "it awaits what is in flight at the end"
    assert 5 <= found.calls <= made - 10, "neither the warm-up counts nor what ended too late"
    assert found.p99_us >= found.p50_us >= 10_000
    assert found.p99_us < 400_000, "the call that ended too late"
    assert found.per_second == pytest.approx(found.calls / 0.1, rel=0.5)
    assert found.resident["me"] > 1_000_000
    assert found.cpu_us["me"] > 0


@pytest.mark.anyio
async def test_a_wrong_answer_ends_the_measurement():
    async def call():
        raise WrongAnswerError("another answer than was sent")

    with pytest.raises(ExceptionGroup) as caught:
        await closed_loop(call, Load(2, 0.01, 0.01), {})
    assert caught.group_contains(WrongAnswerError, match="another answer")


@pytest.mark.anyio
async def test_a_call_that_fails_is_counted_apart_and_told():
    made = 0

    async def call():
        nonlocal made
        made += 1
        number = made
        await asyncio.sleep(0.005)
        if number % 4 == 0:
            raise TimeoutError("no answer in time")

    found = await closed_loop(call, Load(3, 0.02, 0.1), {})
    assert 0 < found.failed < found.calls < made
    assert found.failure == "TimeoutError: no answer in time"
    told = failures_list({"opa": [{256: found}], "raw": rounds(100)})
    assert (
        f"- safe, OPA as a server, 256 in flight: {found.failed} of {found.failed + found.calls} failed"
        in told
    )
    assert "TimeoutError: no answer in time" in told
    assert "nats-py" not in told
    assert failures_list({"raw": rounds(100)}) == ""


@pytest.mark.anyio
async def test_a_load_of_which_nothing_is_answered_has_no_figures():
    async def call():
        raise OSError("refused")

    with pytest.raises(RuntimeError, match=r"no call was answered; .* failed: OSError: refused"):
        await closed_loop(call, Load(2, 0.01, 0.05), {})


def test_the_kernel_counts_this_process():
    began, own = cpu_seconds(os.getpid()), time.process_time()
    sum(range(2_000_000))
    assert cpu_seconds(os.getpid()) - began == pytest.approx(time.process_time() - own, abs=0.05)
    assert 10e6 < resident_bytes(os.getpid()) < 10e9


@pytest.mark.parametrize("package", ["benchmarks.peers", "benchmarks.durable.peers"])
@pytest.mark.parametrize(("peer", "found"), [("bus", False), ("raw", False), ("taskiq", True)])
def test_what_one_peer_brings_is_not_there_for_others(tmp_path, package, peer, found):
    """nats-py loads it where it is installed, and all rows are measured in one environment."""
    (tmp_path / "aiohttp.py").touch()
    program = (
        "import contextlib\n"
        f"from {package} import peer_of\n"
        "from benchmarks.places import Place\n"
        "with contextlib.suppress(ImportError):\n"  # of Taskiq, where it is not installed
        f"    peer_of(Place('a row', {peer!r}, ''))\n"
        "import aiohttp"
    )
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=surroundings, stderr=subprocess.PIPE, check=False, timeout=60
    )
    assert (ended.returncode == 0) is found
    assert (
        found or b"No module named 'aiohttp'" in ended.stderr or b"import of aiohttp halted" in ended.stderr
    )


@pytest.mark.anyio
async def test_the_floor_verifies_what_shares_a_signature(tmp_path):
    """Else it would be no bound for anything that does."""
    svid = TrustDomain("bench.test").issue("agent/worker")
    files = {"worker_certificate": svid.chain_pem(), "worker_key": svid.key_pem()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    sealer = Sealer(Place("floor", "floor", "", {name: str(tmp_path / name) for name in files}), "worker")
    heads = [{"id": number} for number in range(5)]
    sealed = await asyncio.gather(*(sealer.seal(head, b"payload of all") for head in heads))
    assert len({msgpack.unpackb(frame)[1] for frame, _ in sealed}) == 1, "one signature"
    now_ms = now_milliseconds()
    opened = [Opener().open(frame, now_ms) for frame, _ in sealed]
    assert [head["id"] for head, _, _ in opened] == [0, 1, 2, 3, 4]
    assert [digest for _, _, digest in opened] == [digest for _, digest in sealed]
    head, *proof, payload = msgpack.unpackb(sealed[0][0])
    with pytest.raises(WrongAnswerError):
        Opener().open(msgpack.packb([head, *proof, b"another"]), now_ms)
    with pytest.raises(InvalidSignature):
        Opener().open(msgpack.packb([head + b"x", *proof, payload]), now_ms)


@pytest.mark.slow
@pytest.mark.anyio
async def test_rows_are_measured_side_by_side():
    found = await compare(chosen("raw,safe"), rounds=1, seconds=0.2)
    figures = {name: figures_of(one) for name, one in found.items()}
    assert set(figures) == {"raw", "safe"}
    for one in figures.values():
        assert one.at_64.median > 10
        assert one.worker_cpu.median > 0
    assert figures["safe"].memory.median > figures["raw"].memory.median, (
        "raw's worker imports nothing of ours"
    )


@pytest.mark.parametrize("release", ["6.18.44-built-by-somebody", "6.18-rc1", "6.18"])
def test_of_the_kernel_no_more_is_told_than_its_version(monkeypatch, release):
    monkeypatch.setattr(platform, "release", lambda: release)
    told = next(value for name, value in machine._facts() if name == "system")
    assert told == f"{platform.system()} 6.18"
