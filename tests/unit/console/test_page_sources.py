"""The page's own files: nothing in them makes markup or code of text, or comes from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agentweave_bus import console

PAGE = Path(console.__file__).parent / "page"
FILES = sorted(path for path in PAGE.iterdir() if path.suffix in {".js", ".html", ".css"})
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|setHTML|createContextualFragment|DOMParser|srcdoc"
    r"|\beval\b|\bFunction\(|setTimeout\(\s*[\"'`]|javascript:"
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_text_stays_text_and_nothing_comes_from_elsewhere(file):
    text = file.read_text()
    assert FORBIDDEN.search(text) is None
    addresses = set(
        re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    )
    assert addresses <= {"http://www.w3.org/2000/svg"}  # the name of what an element is, not a place


def test_the_document_names_every_file_and_has_nothing_inline():
    document = (PAGE / "index.html").read_text()
    modules = "".join(file.read_text() for file in FILES if file.suffix == ".js")
    for file in FILES:
        if file.suffix == ".css":
            assert f'href="/page/{file.name}"' in document
        elif file.suffix == ".js":
            assert f"/page/{file.name}" in document or f'"./{file.name}"' in modules
    assert re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\bsrc=)", document) is None
