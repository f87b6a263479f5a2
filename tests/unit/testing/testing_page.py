"""docs/testing.md as its reader has it: the text, and the files that the reader copies from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

TEXT: Final = (Path(__file__).parents[3] / "docs" / "testing.md").read_text()
_BLOCK: Final = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE: Final = re.compile(r"# ([\w/]+\.py)\b")


def files() -> dict[str, str]:
    """Return each file's text by its name: a block's first line names it, others go on in the one before."""
    found: dict[str, str] = {}
    name = ""
    for block in _BLOCK.findall(TEXT):
        if begins := _FILE.match(block):
            name = begins[1]
        found[name] = found.get(name, "") + block
    return found
