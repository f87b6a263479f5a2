"""``python -m workers.ecommerce.demo [--keep DIR] [--hold]``: code 0 only if all happened as told."""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import sys
import tempfile
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from agentweave_bus.cli.signals import ENDING, handled
from agentweave_bus.worker import run_on_fastest_loop
from workers.ecommerce.demo.screen import DidNotHappenError, Screen
from workers.ecommerce.demo.story import tell

__all__ = ["main"]

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; return 0 when all of it happened, 1 when something did not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep all state in DIR, which must be new")
    parser.add_argument("--grants", metavar="FILE", type=Path, help="instead of the shop's grants.yaml")
    parser.add_argument("--hold", action="store_true", help="keep the shop open before its end, until Ctrl-C")
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an arrow that a terminal can't show is no failure
    logging.basicConfig(level=logging.CRITICAL)  # attacks make warnings; the demo says what they mean
    screen, began = Screen(), time.monotonic()
    with ExitStack() as block:
        state = _state(options.keep, block)
        try:
            run_on_fastest_loop(_told(screen, state, options.grants, options.hold))
        except (KeyboardInterrupt, asyncio.CancelledError):
            sys.stderr.write("stopped; nothing is left running\n")
            return INTERRUPTED
        except Exception as error:  # noqa: BLE001 - the last boundary of a program
            screen.title(f"\nIt did NOT go as told, after {screen.passed} checks: {_first(error)}")
            return 1
    screen.title(f"\nAll {screen.passed} checks came out as told, in {time.monotonic() - began:.1f} s.")
    return 0


def _state(keep: Path | None, block: ExitStack) -> Path:
    if keep is not None:
        keep.mkdir(mode=0o700, parents=True)
        return keep.absolute()
    return Path(block.enter_context(tempfile.TemporaryDirectory(prefix="agentweave-demo-")))


async def _told(screen: Screen, state: Path, grants: Path | None, hold: bool) -> None:
    with _ended_in_order():
        await tell(screen, state, grants, hold=hold)


def _ended_in_order() -> AbstractContextManager[None]:
    """Turn the first signal into a cancellation, so that all that was started is ended."""
    task = asyncio.current_task()
    assert task is not None  # a coroutine of the loop
    stopping = False

    def stop() -> None:
        nonlocal stopping
        if not stopping:  # a second one would break off the taking down
            stopping = True
            task.cancel()

    return handled(dict.fromkeys(ENDING, stop))


def _first(error: BaseException) -> str:
    """Return what went wrong first, out of the groups in which task groups wrap it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) if isinstance(error, DidNotHappenError) else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
