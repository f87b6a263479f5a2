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
_WHAT = 64


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one mutant; ``seconds`` is how long that took."""

    mutant: Mutant
    verdict: str
    because: str
    seconds: float

    def line(self, width: int) -> str:
        """One line of the table in a terminal; what went wrong is told in full, below it."""
        line = f"  {self.mutant.what:<{_WHAT}}  {self.verdict:<{len(SURVIVES)}}  {self.seconds:4.0f} s  "
        if self.verdict not in (NOTICED, SURVIVES):
            return f"{line}\n    {self.because.strip()}"
        room = max(width - len(line), 20)
        return line + (self.because if len(self.because) <= room else self.because[: room - 1] + "…")


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
