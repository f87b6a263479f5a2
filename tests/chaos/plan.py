"""What is submitted: tasks that are mostly quick, some slow, some in steps, some that fail at first or for good.

All of it follows from a task's number, so that a client that was killed goes on where it was, and whoever
reconciles knows what each task had to come to.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentweave_bus.spiffe_id import SpiffeID

DOMAIN = "chaos.test"
AGENT = SpiffeID.of(DOMAIN, "agent", "chaos")
CLIENT = SpiffeID.of(DOMAIN, "client", "submitter")
AUDITOR = SpiffeID.of(DOMAIN, "client", "auditor")
"""Has every right at the broker, and reads there what was stored."""

ATTEMPTS = 8
TERMINAL = frozenset({"completed", "failed", "canceled", "rejected"})
UNDONE = ("reserve", "charge")
STEPS = ("reserve", "charge", "ship")
_PERIOD = 100
_UNUSUAL = 30
"""So many of a hundred are not quick. They are shared out among the kinds of a run in these proportions:"""
_SHARES = {"slow": 8, "steps": 10, "undo": 5, "again": 4, "fails": 3}
KINDS = tuple(_SHARES)

SETTINGS = "CHAOS_SETTINGS"
"""Names the variable that tells every process of a run where its settings are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all processes of a run have to know.

    ``broken`` names what is taken out of the build: nothing, ``cas`` or ``steps`` (:mod:`.broken`).
    ``ack_wait_s`` is how long the broker waits for a word on a task before somebody else gets it.
    """

    folder: str
    tasks: int
    spread_s: float
    ack_wait_s: int
    bus_url: str
    broker_id: str
    control_endpoint: str
    broken: str = ""
    kinds: tuple[str, ...] = KINDS

    @property
    def effects(self) -> Path:
        return Path(self.folder) / "effects"

    @property
    def accepted(self) -> Path:
        return Path(self.folder) / "accepted"

    @property
    def events(self) -> Path:
        return Path(self.folder) / "events"

    @property
    def client_file(self) -> Path:
        return Path(self.folder) / "client.yaml"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_environment(cls) -> Settings:
        import json

        tree = json.loads(Path(os.environ[SETTINGS]).read_text())
        return cls(**{**tree, "kinds": tuple(tree["kinds"])})


def kind_of(number: int, kinds: tuple[str, ...]) -> str:
    """Return which capability task ``number`` asks for. The kinds are mixed, not one after the other."""
    place = number * 37 % _PERIOD
    whole = sum(_SHARES[kind] for kind in kinds)
    for kind in kinds:
        share = _SHARES[kind] * _UNUSUAL / whole
        if place < share:
            return kind
        place -= share
    return "quick"


def payload_of(number: int, kind: str) -> dict[str, Any]:
    payload: dict[str, Any] = {"number": number}
    if kind == "slow":
        payload["seconds"] = 0.5 + number * 7 % 23 / 10  # 0.5 to 2.7
    if kind == "again":
        payload["times"] = 1 + number % 2
    return payload


def key_of(number: int) -> str:
    """Return the idempotency key of task ``number``."""
    return f"chaos-{number}"


def is_cancelled(number: int, kind: str) -> bool:
    """Say whether its submitter has second thoughts about a task soon after it was accepted."""
    return kind == "slow" and number % 4 == 0


def expected_states(number: int, kind: str) -> frozenset[str]:
    """Return how a task may end. One that is cancelled may have ended by itself before."""
    if kind in {"fails", "undo"}:
        return frozenset({"failed"})
    return frozenset({"completed", "canceled"} if is_cancelled(number, kind) else {"completed"})
