"""``docs/mutants.md``: which check is missed by which attack."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.documents import replace_part
from tests.security.mutants.mutant import Mutant

__all__ = ["NOTICED", "PAGE", "SURVIVES", "Row", "document_with"]

PAGE = Path(__file__).resolve().parents[3] / "docs" / "mutants.md"
NOTICED = "noticed"
SURVIVES = "survives"


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one mutant; ``seconds`` is how long that took."""

    mutant: Mutant
    verdict: str
    because: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.mutant.name:<70} {self.verdict:<10} {self.because} ({self.seconds:.1f} s)"


def document_with(document: str, rows: Sequence[Row]) -> str:
    """Return ``document`` with both of its tables renewed."""
    noticed = ((row.mutant.name, f"`{_in_a_cell(row.because)}`") for row in rows if row.verdict == NOTICED)
    document = replace_part(document, "noticed", _table("missed by", noticed))
    survivors = ((row.mutant.name, row.because) for row in rows if row.verdict == SURVIVES)
    return replace_part(document, "survivors", _table("why no attack gets through", survivors))


def _table(title: str, rows: Iterable[tuple[str, str]]) -> str:
    lines = [f"| taken out | {title} |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)]
    return "\n".join(lines)


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|")
