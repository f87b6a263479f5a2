"""Where results are kept: as JSON in ``build/``, and in the marked parts of ``docs/benchmarks.md``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

__all__ = ["DOCUMENT", "PICTURE", "RESULTS", "TASKS_PICTURE", "replace_part", "save", "write_part"]

_ROOT: Final = Path(__file__).parent.parent
RESULTS: Final = _ROOT / "build" / "benchmarks.json"
DOCUMENT: Final = _ROOT / "docs" / "benchmarks.md"
PICTURE: Final = _ROOT / "docs" / "benchmarks.svg"
TASKS_PICTURE: Final = _ROOT / "docs" / "benchmarks-tasks.svg"


def save(part: str, content: Any) -> None:
    """Put ``content`` under ``part`` into the results, beside what other runs left there."""
    RESULTS.parent.mkdir(exist_ok=True)
    document: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**document, part: content}, indent=1))


def load() -> Mapping[str, Any]:
    """Return what the last runs left."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write_part(part: str, text: str) -> None:
    """Replace ``part`` of the document."""
    DOCUMENT.write_text(replace_part(DOCUMENT.read_text(), part, text))


def replace_part(document: str, part: str, text: str) -> str:
    """Return ``document`` with what stands between the marks of ``part`` replaced by ``text``.

    Raises:
        ValueError: the marks are not there, once each and in order.

    """
    begin, end = f"<!-- begin {part} -->", f"<!-- end {part} -->"
    before, found, rest = document.partition(begin)
    _old, ended, after = rest.partition(end)
    if not found or not ended or begin in rest or end in after:
        raise ValueError(f"the document has no single pair of marks {begin} and {end}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
