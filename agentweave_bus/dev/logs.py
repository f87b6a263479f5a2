"""The log of a process that is several agents: text for people, each line with its agent's name."""

from __future__ import annotations

import logging

from agentweave_bus.dev.serving import agent_name
from agentweave_bus.observability.logs import TextFormatter

__all__ = ["PrefixedFormatter", "prefix_log"]


class PrefixedFormatter(TextFormatter):
    """Text with the name of the agent at work before each line, ``width`` columns wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines for ``record``."""
        head = f"{agent_name.get().ljust(self._width)} | "
        return "\n".join(head + line for line in super().format(record).splitlines())


def prefix_log(width: int) -> None:
    """Have what this process logs say whose it is."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PrefixedFormatter(width))
