"""What the processes of a row are told: where things are, and what is sent."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

__all__ = ["PAYLOAD", "PAYLOAD_BYTES", "Place"]

PAYLOAD_BYTES: Final = 1024

PAYLOAD: Final = "".join(random.Random(7).choices(string.ascii_letters, k=PAYLOAD_BYTES))  # noqa: S311 - no secret
"""The text that every row sends and gets back. Letters: one byte each in every encoding that rows use."""


@dataclass(frozen=True, slots=True)
class Place:
    """One row's worker, and how its client reaches it.

    ``peer`` names a module of :mod:`benchmarks.peers`; ``address`` is a broker's or a server's URL;
    ``options`` is what that peer needs beside.
    """

    row: str
    peer: str
    address: str
    options: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return it as an argument for a child process."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Place:
        """Read what :meth:`to_json` wrote."""
        return Place(**json.loads(text))
