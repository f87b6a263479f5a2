"""Whom a changed file concerns: the agents that are made of it, as far as they don't follow it themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from agentweave_bus.config import StackConfig
from agentweave_bus.dev.source_files import SourceFiles
from agentweave_bus.exceptions import ConfigurationError
from agentweave_bus.supervisor.plans import PlannedAgent

__all__ = ["WatchedAgent", "WatchedStack"]


@dataclass(frozen=True, slots=True)
class WatchedAgent:
    """An agent: its name, its module, and its configuration file."""

    name: str
    module: str
    config: Path

    @classmethod
    def of(cls, agent: PlannedAgent) -> WatchedAgent:
        """Take from a plan what is watched."""
        path = agent.entry.class_ or agent.config.agent.class_ or ""
        return cls(agent.config.agent.name, path.partition(":")[0], agent.entry.config.absolute())


class WatchedStack:
    """The agents of a stack's file, and which files they are made of at the moment.

    ``stack_file`` is ``None`` where there is none. Grants, policies and revocations are followed by whoever
    uses them, so they concern nobody here.
    """

    def __init__(
        self, config: StackConfig, agents: Iterable[PlannedAgent], stack_file: Path | None = None
    ) -> None:
        self.agents = tuple(map(WatchedAgent.of, agents))
        self.stack_file = None if stack_file is None else stack_file.absolute()
        self._followed = [one for one in (config.policy_source, config.revocations_file) if one is not None]
        self._sources = SourceFiles()
        self._modules: dict[str, dict[str, Path]] = {}
        self._files: dict[str, frozenset[Path]] = {}
        self.read_again()

    def read_again(self) -> None:
        """See of which files each agent is made now. One that can't be found keeps those that it had."""
        for agent in self.agents:
            found = self._sources.of(agent.module, agent.config.parent)
            self._modules[agent.name] = found
            self._files[agent.name] = frozenset(found.values()) or self._files.get(agent.name, frozenset())

    def files_of(self, name: str) -> frozenset[Path]:
        """Return the source files of an agent."""
        return self._files[name]

    def check_one_process(self) -> None:
        """Refuse agents that can't be imported beside each other.

        Raises:
            ConfigurationError: by one name two of them mean different modules.

        """
        known: dict[str, Path] = {}
        for modules in self._modules.values():
            for name, file in modules.items():
                if (other := known.setdefault(name, file)) != file:
                    raise ConfigurationError(
                        f"The module {name} is {other} for one agent and {file} for another,"
                        " and in one process there is one.",
                        key="agents",
                        hint="Rename one, put them into packages, or use `agentweave up --reload`.",
                    )

    def folders(self) -> Collection[Path]:
        """Return the directories in which a change may concern somebody."""
        folders = {file.parent for files in self._files.values() for file in files}
        folders.update(agent.config.parent for agent in self.agents)
        if self.stack_file is not None:
            folders.add(self.stack_file.parent)
        return folders

    def concerned(self, changed: Collection[Path]) -> list[str]:
        """Return the names of the agents that are made of changed files, before or after the change."""
        before = dict(self._files)
        self.read_again()
        return [
            agent.name
            for agent in self.agents
            if any(
                self._concerns(path, agent, before[agent.name] | self._files[agent.name]) for path in changed
            )
        ]

    def sharing(self, name: str) -> list[str]:
        """Return the names of all agents that share a source file with this one, or with one that does."""
        together, files = {name}, set(self._files[name])
        while more := [
            one for one, its in self._files.items() if one not in together and not files.isdisjoint(its)
        ]:
            together.update(more)
            files.update(*(self._files[one] for one in more))
        return [agent.name for agent in self.agents if agent.name in together]

    def _concerns(self, path: Path, agent: WatchedAgent, files: frozenset[Path]) -> bool:
        if path.suffix == ".py":
            return path in files
        if path == agent.config:
            return True
        if path == self.stack_file or any(path == one.config for one in self.agents):
            return False
        if any(path.is_relative_to(one) for one in self._followed):
            return False
        return any(path.parent == file.parent for file in files)  # data beside its code
