"""Waiting for files to change.

The system tells that something has happened in a directory; what has changed is seen by comparing sizes,
times and inodes. So nothing is missed when the directories that are watched change, or when the system says
nothing, as on some shared disks: it is looked every second anyway.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing
from pathlib import Path
from typing import Final, TypeAlias

from agentweave_bus.exceptions import ConfigurationError

__all__ = ["SUFFIXES", "changes", "require_watchfiles"]

SUFFIXES: Final = frozenset({".py", ".yaml", ".yml", ".json", ".rego"})

_LOOK_MS: Final = 1000
_TOGETHER_MS: Final = 400
"""For how long what keeps changing is waited for at most; an editor writes several files one by one."""
_QUIET_MS: Final = 50

_Stamps: TypeAlias = "dict[Path, tuple[int, int, int]]"


def require_watchfiles() -> None:
    """Refuse to go on where changes can't be watched. Raises ConfigurationError."""
    try:
        import watchfiles  # noqa: F401, PLC0415 - optional
    except ImportError as error:
        raise ConfigurationError(
            "Watching for changed files needs watchfiles, which is not installed.",
            hint="Run: pip install 'agentweave-bus[embedded]' (from a clone: pip install '.[embedded]')",
        ) from error


async def changes(folders: Callable[[], Collection[Path]]) -> AsyncGenerator[frozenset[Path], None]:
    """Yield the files that have changed, come or gone, each time some have, until cancelled.

    Only files directly in ``folders``, which are asked for anew each time, and with a suffix of
    :data:`SUFFIXES`. Close what this returns.
    """
    from watchfiles import awatch  # noqa: PLC0415 - optional

    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # at INFO it tells of each look
    asked = set(folders())
    watched = _existing(asked)
    stamps = _stamps(watched)
    while True:
        notices = awatch(
            *watched,
            watch_filter=_counts,
            debounce=_TOGETHER_MS,
            step=_QUIET_MS,
            rust_timeout=_LOOK_MS,
            yield_on_timeout=True,
            recursive=False,
        )
        async with aclosing(notices):
            async for _ in notices:
                found = _stamps(watched)
                changed = frozenset(path for path, _ in stamps.items() ^ found.items())
                stamps = found
                if changed:
                    yield changed
                before, asked = asked, set(folders())
                if (wanted := _existing(asked)) != watched:
                    kept = {path: stamp for path, stamp in stamps.items() if path.parent in wanted}
                    fresh = [folder for folder in wanted if folder not in before]  # others come back: news
                    stamps, watched = {**_stamps(fresh), **kept}, wanted
                    break


def _counts(_change: object, path: str) -> bool:
    return Path(path).suffix in SUFFIXES


def _existing(folders: Collection[Path]) -> list[Path]:
    return sorted(folder for folder in folders if folder.is_dir())


def _stamps(folders: Collection[Path]) -> _Stamps:
    stamps: _Stamps = {}
    for folder in folders:
        try:
            entries = list(os.scandir(folder))
        except OSError:
            continue  # it has gone; so have its files
        for entry in entries:
            path = Path(entry.path)
            try:
                status = entry.stat()
            except OSError:
                continue
            if path.suffix in SUFFIXES:
                stamps[path] = (status.st_mtime_ns, status.st_size, status.st_ino)
    return stamps
