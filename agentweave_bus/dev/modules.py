"""Importing agents anew: their own modules all at once, or, where that fails, none of them.

Modules are dropped together with all that agents share with each other, so that no two copies of a class or
of a module's state are in use. The process's environment is what a worker of the agent would have, while it
is imported.
"""

from __future__ import annotations

import importlib
import linecache
import os
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Final

from agentweave_bus.agent import SecureAgent
from agentweave_bus.config import load_config
from agentweave_bus.dev.source_files import is_own
from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError
from agentweave_bus.supervisor.worker_process import WorkerSpec
from agentweave_bus.worker import find_agent, look_beside

__all__ = ["anew", "as_in_a_worker", "made", "variables_of_all", "what_went_wrong"]

_OWN_PREFIX: Final = "AGENTWEAVE_"


@contextmanager
def anew(files: Collection[Path]) -> Iterator[None]:
    """Have modules of ``files`` imported again in the block; if it fails, those that were there are back."""
    importlib.invalidate_caches()
    linecache.checkcache()
    before = _modules_of(files)
    _forget(before)
    try:
        yield
    except BaseException:
        _forget(_modules_of(files))
        sys.modules.update(before)
        raise


def made(spec: WorkerSpec, environment: str | None) -> SecureAgent:
    """Load an agent's configuration and make it, as its worker would.

    Raises whatever its module raises, too; ``what_went_wrong`` tells it.
    """
    with as_in_a_worker(spec.environment):
        config = load_config(spec.config, environment=environment)
        look_beside(spec.config)
        return find_agent(config, spec.class_path)


@contextmanager
def as_in_a_worker(variables: Mapping[str, str]) -> Iterator[None]:
    """Give this process the variables of one worker, for a block that waits for nothing."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def variables_of_all(specs: Collection[WorkerSpec]) -> dict[str, str]:
    """Return the variables of their own that the agents' entries set, for a process that is all of them.

    Raises:
        ConfigurationError: two agents want the same variable in different ways.

    """
    together: dict[str, tuple[str, str]] = {}
    for spec in specs:
        for name, value in spec.environment.items():
            if name.startswith(_OWN_PREFIX):
                continue
            whose, other = together.setdefault(name, (spec.name, value))
            if other != value:
                raise ConfigurationError(
                    f"{whose} and {spec.name} want different values of {name}, and one process has one.",
                    key="agents.*.env",
                    hint="Make them equal, or use `agentweave up --reload`.",
                )
    return {name: value for name, (_, value) in together.items()}


def what_went_wrong(error: BaseException) -> str:
    """Tell an error with the lines of the user's own code that led to it; of other code it says nothing."""
    if isinstance(error, AgentWeaveError) and error.__cause__ is None:
        return str(error)
    cause = error.__cause__ if isinstance(error, AgentWeaveError) and error.__cause__ else error
    own = [one for one in traceback.extract_tb(cause.__traceback__) if _is_file(one.filename)]
    lines = [*traceback.format_list(own), *traceback.format_exception_only(cause)]
    head = f"{error}\n" if cause is not error else ""
    return head + "".join(lines).rstrip()


def _is_file(name: str) -> bool:
    return not name.startswith("<") and is_own(Path(name))


def _modules_of(files: Collection[Path]) -> dict[str, ModuleType]:
    return {
        name: module
        for name, module in list(sys.modules.items())
        if (file := getattr(module, "__file__", None)) is not None and Path(file) in files
    }


def _forget(modules: Collection[str]) -> None:
    for name in modules:
        sys.modules.pop(name, None)
