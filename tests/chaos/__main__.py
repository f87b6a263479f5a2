"""``python -m tests.chaos``: the whole of it, as ``make chaos`` runs it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.broken import BREAKS
from tests.chaos.faults import AWAY, CRASHES, FULL, OVERLAP, SMALL
from tests.chaos.plan import KINDS
from tests.chaos.run import Wanted, run

_SCHEDULES = {"full": FULL, "small": SMALL, "overlap": OVERLAP, "crashes": CRASHES, "away": AWAY}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--duration", type=float, default=600, help="seconds after which it must be over")
    parser.add_argument("--ack-wait", type=int, default=5, help="seconds without a word on a task")
    parser.add_argument("--seed", type=int, default=None, help="of the faults' order and victims")
    parser.add_argument("--faults", choices=_SCHEDULES, default="full")
    parser.add_argument("--broken", choices=("", *BREAKS), default="", help="take a part out of the build")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of tasks that are not quick")
    parser.add_argument("--show", type=int, default=50, help="findings at most")
    parser.add_argument("--folder", type=Path, help="where everything stays; else it is removed")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("agentweave_bus").setLevel(logging.ERROR)
    seed = int(time.time()) if options.seed is None else options.seed
    wanted = Wanted(
        tasks=options.tasks,
        duration_s=options.duration,
        schedule=_SCHEDULES[options.faults],
        ack_wait_s=options.ack_wait,
        seed=seed,
        broken=options.broken,
        kinds=tuple(filter(None, options.kinds.split(","))),
    )
    sys.stdout.write(f"{wanted.tasks} tasks, seed {seed}\n")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report = asyncio.run(run(wanted, folder))
    told = [f"FAULT {finding}" for finding in report.findings[: options.show]]
    if (left := len(report.findings) - options.show) > 0:
        told.append(f"and {left} more")
    sys.stdout.write("\n".join([report.table(), *told, ""]))
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
