"""What is done to the build of a run: time that goes faster, and parts that are taken out to see who notices.

``cas``: the streams of slots let a subject be written again and keep both messages, so that no write is ever
refused; nothing else compares. ``blind``: the streams refuse as ever, and writers take that for a yes.
``steps``: what a step did is neither written down nor found.
"""

from __future__ import annotations

from typing import Any

from agentweave_bus.bus import streams
from agentweave_bus.bus.slots import SlotOutcome, Slots
from tests.chaos.plan import Settings

BREAKS = ("cas", "blind", "steps")


def apply(settings: Settings) -> None:
    """Change this process's copy of the package. Every process of a run does it as it starts."""
    if settings.broken:
        {"cas": _no_compare_and_set, "blind": _blind, "steps": _no_step_records}[settings.broken]()


def _no_compare_and_set() -> None:
    streams._WRITTEN_ONCE.clear()
    streams._WRITTEN_ONCE.update({"retention": "limits"})


def _blind() -> None:
    wrote = Slots.write

    async def write(self: Slots, *arguments: Any, **named: Any) -> SlotOutcome:
        outcome = await wrote(self, *arguments, **named)
        return SlotOutcome.WRITTEN if outcome is SlotOutcome.TAKEN else outcome

    Slots.write = write  # type: ignore[method-assign]


def _no_step_records() -> None:
    from agentweave_bus.agent.saga import Ledger

    async def load(_self: Any, _name: str) -> None:
        return None

    async def save(_self: Any, _name: str, record: Any) -> Any:
        return record

    Ledger.load = load  # type: ignore[method-assign]
    Ledger.save = save  # type: ignore[method-assign]
