"""Taking up changed files, for the commands that do: it is for development only.

Workers whose files change are replaced one by one, as the supervisor replaces them for any reason: a fresh
worker is ready before the old one is told to end, and where it does not become ready the old one goes on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Awaitable, Callable, Collection
from contextlib import aclosing
from pathlib import Path

from agentweave_bus.config.sources import choose_environment
from agentweave_bus.config.stack import DEFAULT_STACK_FILE
from agentweave_bus.dev.concerned import WatchedStack
from agentweave_bus.dev.watching import changes, require_watchfiles
from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError, WorkerError

__all__ = [
    "add_reload_argument",
    "file_names",
    "prepare_reloading",
    "refuse_production",
    "replace_on_change",
    "stack_file",
]


def add_reload_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--reload``."""
    parser.add_argument(
        "--reload",
        action="store_true",
        help="replace an agent's workers when its files change; in development only",
    )


def prepare_reloading(options: argparse.Namespace) -> None:
    """Make sure that files may be changed under what the arguments start, if they ask for ``--reload``.

    Raises:
        ConfigurationError: they may not in this environment, or changes can't be watched.

    """
    if options.reload:
        refuse_production(
            choose_environment(options.env, os.environ), "--reload", instead="add --env development"
        )
        require_watchfiles()
        # What a worker compiled a moment ago must not be taken for what is there now.
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


def refuse_production(
    environment: str, what: str, *, instead: str = "set AGENTWEAVE_ENV=development"
) -> None:
    """Refuse to run ``what`` in any environment but development; ``instead`` is how to choose that.

    Raises:
        ConfigurationError: it is another one.

    """
    if environment != "development":
        raise ConfigurationError(
            f"{what} is for development, and this environment is {environment}.",
            key="AGENTWEAVE_ENV",
            hint=f"Where files may be changed under what runs, {instead}.",
        )


def stack_file(named: str | None) -> Path | None:
    """Return the stack's file, ``named`` or the usual one, if there is one."""
    file = Path(named or DEFAULT_STACK_FILE)
    return file if file.exists() else None


async def replace_on_change(
    watched: WatchedStack,
    restart: Callable[[str], Awaitable[None]],
    say: Callable[[str], None],
    on_stack_file: Callable[[], Awaitable[WatchedStack]] | None = None,
) -> None:
    """Have ``restart`` called for each agent whose files change, one after the other, until cancelled.

    ``on_stack_file`` takes up the stack's own file, and returns what is watched from then on.
    """
    while True:
        async with aclosing(changes(watched.folders)) as all_changes:
            async for changed in all_changes:
                if watched.stack_file in changed and on_stack_file is not None:
                    watched = await on_stack_file()
                    break
                if watched.stack_file in changed:
                    say(f"{file_names(changed)} changed: start again to follow the stack's own file")
                for name in watched.concerned(changed):
                    say(f"{file_names(changed)} changed, which {name} is made of")
                    try:
                        await restart(name)
                    except WorkerError:
                        pass  # it was told as it happened
                    except AgentWeaveError as error:  # as of one that is called otherwise since a reload
                        say(f"nothing is replaced: {error}")


def file_names(paths: Collection[Path]) -> str:
    """Return the names of files, for people."""
    return ", ".join(sorted(path.name for path in paths))
