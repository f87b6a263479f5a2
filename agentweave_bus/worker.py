"""The entry point of a worker process: ``python -m agentweave_bus.worker FILE [--class MODULE:CLASS]``.

It loads the configuration, finds the agent's class, and serves until it is told to stop. ``agentweave
serve`` and whoever starts several workers use the same functions.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import logging
import sys
from pathlib import Path
from typing import Any

from agentweave_bus.agent import SecureAgent
from agentweave_bus.config import AgentConfig, load_config
from agentweave_bus.config.fields import as_module
from agentweave_bus.exceptions import AgentWeaveError, ConfigurationError
from agentweave_bus.runtime import Runner
from agentweave_bus.runtime.process import settle

__all__ = ["find_agent", "look_beside", "main", "run_on_fastest_loop", "serve"]

_log = logging.getLogger(__name__)


def find_agent(config: AgentConfig, class_path: str | None = None) -> SecureAgent:
    """Return the agent that ``module:Name`` names, ``config``'s own ``agent.class`` by default.

    The module may be written as its file, ``folder/file.py:Name``. ``Name`` is a ``SecureAgent`` class, which
    is given ``config``, or an ``Agent`` object of the module.

    Raises:
        ConfigurationError: nothing is named, or what is named is no agent; the message says what it is.

    """
    path = as_module(class_path) if class_path else config.agent.class_
    if path is None:
        raise ConfigurationError(
            "It is not said which class to run.",
            key="agent.class",
            hint="Set agent.class to module:Class, or pass --class.",
        )
    found = _import(path)
    if isinstance(found, type) and issubclass(found, SecureAgent):
        return found(config)
    if isinstance(found, SecureAgent):
        return found
    raise ConfigurationError(
        f"{path} is {found!r:.80}, not an agent.",
        key="agent.class",
        hint="Name a subclass of SecureAgent, or an Agent object.",
    )


def _import(path: str) -> Any:
    module_name, _, name = path.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as python -m does: the agent's module lies where it is started
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        if not _is_itself(module_name, error):
            raise ConfigurationError(
                f"{module_name}, of agent.class {path!r}, is there but imports what is not: {error}.",
                key="agent.class",
                hint="Install what it needs into this environment, or correct its import.",
            ) from error
        raise ConfigurationError(
            f"The module of agent.class {path!r} can't be imported: {error}.",
            key="agent.class",
            hint=f"Start it in the directory that holds {module_name.partition('.')[0]}, put the"
            " configuration beside it, or set PYTHONPATH.",
        ) from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        raise ConfigurationError(
            f"{module_name} has no {name!r}.", key="agent.class", hint="Name what the module defines."
        ) from error


def _is_itself(module_name: str, error: ImportError) -> bool:
    """Say whether it is the module, or a package around it, that is missing, not what it imports."""
    missing = error.name or ""
    return isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{missing}.")


def look_beside(config_file: Path) -> None:
    """Let the agent's module lie beside its configuration; whatever is installed comes first."""
    folder = str(config_file.absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)


async def serve(
    path: str | Path | None, *, environment: str | None = None, class_path: str | None = None
) -> None:
    """Load a configuration and serve its agent until told to stop.

    The agent's module is looked for in the working directory, then among what is installed, then beside
    the configuration.

    Raises:
        AgentWeaveError: it can't be served; the message says why and the way out.

    """
    config = load_config(path, environment=environment)
    if path is not None:
        look_beside(Path(path))
    await Runner(on_started=settle).run(find_agent(config, class_path))


def run_on_fastest_loop(main: Any) -> None:
    """Run a coroutine on uvloop where it is installed, else on asyncio's own loop."""
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        asyncio.run(main)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


def main(arguments: list[str] | None = None) -> int:
    """Run one worker; returns the exit code: 0 told to stop, 2 configuration, 4 what else kept it back."""
    parser = argparse.ArgumentParser(prog="python -m agentweave_bus.worker", description="Serve one agent.")
    parser.add_argument("config", help="the agent's YAML")
    parser.add_argument("--class", dest="class_path", metavar="MODULE:CLASS", help="instead of agent.class")
    parser.add_argument("--env", choices=("production", "development"), help="instead of AGENTWEAVE_ENV")
    options = parser.parse_args(arguments)
    try:
        run_on_fastest_loop(serve(options.config, environment=options.env, class_path=options.class_path))
    except ConfigurationError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except AgentWeaveError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
