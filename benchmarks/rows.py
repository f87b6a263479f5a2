"""The rows of the comparison: what each is, and what it is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["ROWS", "Row", "chosen"]


@dataclass(frozen=True, slots=True)
class Row:
    """One thing measured. ``peer`` names a module of :mod:`benchmarks.peers`.

    Rows of this project name the ``capability`` that is called, and whether ``opa`` decides as a server.
    A ``quiet`` one has its log switched off. One that stands ``aside`` is measured only when it is named.
    """

    name: str
    title: str
    peer: str
    capability: str = ""
    opa: bool = False
    quiet: bool = False
    aside: bool = False


ROWS: Final = (
    Row("raw", "nats-py over mTLS", "raw"),
    Row("floor", "the least that signs and decides", "floor", aside=True),
    Row("safe", "safe, standing answer", "bus", "echo"),
    Row("payload", "safe, policy reads the payload", "bus", "limited"),
    Row("claimed", "not safe, claimed", "bus", "claimed"),
    Row("opa", "safe, OPA as a server", "bus", "limited", opa=True),
    Row("faststream", "FastStream on plain NATS", "faststream"),
    Row("faststream-quiet", "FastStream, its log off", "faststream", quiet=True),
    Row("a2a", "a2a-sdk over plain HTTP", "a2a"),
)


def chosen(names: str) -> tuple[Row, ...]:
    """Return the rows that ``names`` lists, separated by commas, in the table's order.

    Raises:
        ValueError: there is no row of such a name.

    """
    wanted = names.split(",")
    if unknown := sorted(set(wanted) - {row.name for row in ROWS}):
        raise ValueError(f"no such row: {', '.join(unknown)}; there are {', '.join(r.name for r in ROWS)}")
    return tuple(row for row in ROWS if row.name in wanted)
