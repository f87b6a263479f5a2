"""The table of attacks in ``docs/security.md``, made from the marks of the tests themselves.

``make attacks`` writes it. Collecting runs nothing, so it needs no broker.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest

from agentweave_bus.bus.admission import Step
from benchmarks.documents import replace_part
from tests.security.catalogue import Adversary, Layer

__all__ = ["DOCUMENT", "Unmarked", "collected", "document_with", "unmarked_without_a_word"]

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "security.md"
SUITE = ROOT / "tests" / "security"
HONEST = "Honest"
OPEN = "Not protected"


@dataclass(frozen=True, slots=True)
class Attack:
    """One marked test, or one case of it."""

    file: str
    test: str
    what: str
    where: Step | Layer
    by: Adversary


@dataclass(frozen=True, slots=True)
class Unmarked:
    """A test that attacks nothing: what it says of itself has to begin with one of two words."""

    file: str
    test: str
    says: str


class _Collector:
    def __init__(self) -> None:
        self.items: list[pytest.Function] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        self.items = list(items)


def collected() -> tuple[list[Attack], list[Unmarked]]:
    """Return all attacks of the suite, a case each, and the tests that are none, in the files' order."""
    collector, said = _Collector(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = pytest.main(
            [
                "--collect-only",
                "-qq",
                "-p",
                "no:cacheprovider",
                "--assert=plain",
                f"--rootdir={ROOT}",
                str(SUITE),
            ],
            plugins=[collector],
        )
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"the attacks could not be collected:\n{said.getvalue()}")
    attacks: list[Attack] = []
    others: dict[tuple[str, str], Unmarked] = {}
    for item in collector.items:
        file, test = str(item.path.relative_to(SUITE)), item.originalname
        marks = list(item.iter_markers("refused_by"))
        attacks += [
            Attack(file, test, mark.kwargs["what"], mark.args[0], mark.kwargs["by"]) for mark in marks
        ]
        if not marks:
            others[file, test] = Unmarked(file, test, item.function.__doc__ or "")
    return attacks, list(others.values())


def unmarked_without_a_word(others: Iterable[Unmarked]) -> list[str]:
    """Name the tests that neither attack nor say that they show what is honest, or not protected."""
    return [f"{one.file}::{one.test}" for one in others if not one.says.startswith((HONEST, OPEN))]


def document_with(document: str, attacks: Sequence[Attack], others: Iterable[Unmarked]) -> str:
    """Return ``document`` with both of its generated parts renewed."""
    document = replace_part(document, "attacks", _table(attacks))
    return replace_part(document, "not protected", _open_list(others))


def _table(attacks: Sequence[Attack]) -> str:
    tests = {(one.file, one.test) for one in attacks}
    lines = [
        f"{len(tests)} tests attack in {len(attacks)} cases; a number behind a sentence counts its cases.",
    ]
    order = {where: number for number, where in enumerate([*Step, *Layer])}
    ordered = sorted(attacks, key=lambda one: order[one.where])
    for where, refused in groupby(ordered, key=lambda one: one.where):
        lines += ["", f"**{_name(where)}**", "", "| what is tried | by | file |", "|---|---|---|"]
        lines += _rows(list(refused))
    return "\n".join(lines)


def _name(where: Step | Layer) -> str:
    if isinstance(where, Step):
        return f"Admission, step {where.number}: {where.label}"
    return where.value[0].upper() + where.value[1:]


def _rows(attacks: Sequence[Attack]) -> list[str]:
    """A row for each file and adversary."""
    rows: dict[tuple[str, Adversary], list[Attack]] = {}
    for one in attacks:
        rows.setdefault((one.file, one.by), []).append(one)
    return [
        f"| {'; '.join(_sentences(those))} | {by.value} | [{file}](../tests/security/{file}) |"
        for (file, by), those in rows.items()
    ]


def _sentences(attacks: Sequence[Attack]) -> list[str]:
    """What is tried: the cases of one test are joined where they begin alike."""
    sentences: list[str] = []
    for _test, cases in groupby(attacks, key=lambda one: one.test):
        counts: dict[str, int] = {}
        for one in cases:
            counts[one.what] = counts.get(one.what, 0) + 1
        said = [
            what.replace("|", "\\|") + (f" ({count})" if count > 1 else "") for what, count in counts.items()
        ]
        sentences += _joined(said)
    return sentences


def _joined(said: Sequence[str]) -> list[str]:
    alike = _words_alike([one.split() for one in said])
    if len(said) < 3 or alike < 2:
        return list(said)
    start = " ".join(said[0].split()[:alike])
    return [f"{start} … " + " / ".join(" ".join(one.split()[alike:]) for one in said)]


def _words_alike(said: Sequence[Sequence[str]]) -> int:
    alike = 0
    for words in zip(*said, strict=False):
        if len(set(words)) > 1:
            break
        alike += 1
    return min(alike, *(len(words) - 1 for words in said))


def _open_list(others: Iterable[Unmarked]) -> str:
    return "\n".join(
        f"- {_first_paragraph(one.says)} ([{one.file}](../tests/security/{one.file}))"
        for one in others
        if one.says.startswith(OPEN)
    )


def _first_paragraph(says: str) -> str:
    text = " ".join(says.split("\n\n", maxsplit=1)[0].split()).replace("``", "`")
    text = text.removeprefix(f"{OPEN}: ").removeprefix(f"{OPEN}, ")
    return text[0].upper() + text[1:]


def main() -> None:
    """Write the table."""
    DOCUMENT.write_text(document_with(DOCUMENT.read_text(), *collected()))


if __name__ == "__main__":
    main()
