"""``docs/reference-errata.md`` names the edits that were made: what it says stands in the files is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ERRATA = (HERE.parents[1] / "docs" / "reference-errata.md").read_text()
CODE = re.compile(r"`([^`]+)`")


def rows() -> list[tuple[Path, str, str]]:
    """Return file, "It says" and "Runs here" of each row that is about a file of these tests."""
    found = []
    for line in ERRATA.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        path = CODE.fullmatch(cells[0].strip())
        if len(cells) == 4 and path is not None and (HERE / path[1]).exists():
            found.append((HERE / path[1], cells[1], cells[2]))
    return found


def test_every_table_has_rows_about_files() -> None:
    folders = {path.relative_to(HERE).parts[0] for path, _, _ in rows()}
    assert folders == {"ecommerce", "federation", "architecture", "faq"}
    assert len(rows()) >= 18


@pytest.mark.parametrize(("path", "says", "runs"), [row for row in rows() if CODE.fullmatch(row[2])])
def test_an_edit_is_in_the_file(path: Path, says: str, runs: str) -> None:
    text = path.read_text()
    assert runs.strip("`") in text
    if (original := CODE.fullmatch(says)) is not None:
        assert original[1] not in text


def test_every_file_of_the_examples_is_named_or_unchanged() -> None:
    """Files that the documents don't show are named as such."""
    named = {path for path, _, _ in rows()}
    written = {path for path, _, runs in rows() if runs == "written for this"}
    assert {HERE / "ecommerce" / "payment_agent.py", HERE / "ecommerce" / "inventory_agent.py"} <= written
    for path in (*(HERE / "ecommerce").glob("*_agent.py"), *(HERE / "federation").rglob("*_agent.py")):
        assert path in named, path


def test_no_snippet_imports_the_documents_package() -> None:
    for path in HERE.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) agentweave(\.| )", path.read_text(), re.MULTILINE), path
