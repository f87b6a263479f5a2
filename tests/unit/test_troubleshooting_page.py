"""``docs/troubleshooting.md`` names every exception and every check, and quotes only what is really said."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from agentweave_bus import exceptions
from agentweave_bus.cli.doctor import CHECKS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))
QUOTES = [
    (section, quote)
    for section, text in SECTIONS.items()
    for quote in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
]
WORDLESS = {
    "AgentCallError",
    "AgentWeaveError",
    "EnvelopeError",
    "PolicyError",
    "RetryableError",
    "TaskFailedError",
    "WorkerError",
    # Raised by parts that are not there yet; whoever raises one quotes its words and takes it off here.
    "AttemptLostError",
    "IdempotencyError",
    "QueueFullError",
    "TaskCanceledError",
    "TaskNotFoundError",
}
"""Branches, and what is raised in words of others: nothing needs to be quoted as this class's own."""
ANYTHING = "…"


@cache
def sentences() -> dict[str, frozenset[str]]:
    """Every text in the package's code with ``…`` for what is filled in, by the calls that it is given to."""
    found: dict[str, set[str]] = {"": set()}
    for path in (ROOT / "agentweave_bus").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                found.setdefault(name, set()).update(
                    text for inner in ast.walk(node) if (text := sentence(inner)) is not None
                )
            elif (text := sentence(node)) is not None:
                found[""].add(text)
    return {name: frozenset(texts) for name, texts in found.items()}


def sentence(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{\w*\}", ANYTHING, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else ANYTHING for part in node.values
        )
    return None


def is_said(quote: str, by: str) -> bool:
    return any(quote in re.sub(f"{ANYTHING}+", ANYTHING, text) for text in sentences().get(by, ()))


def public_exceptions() -> Iterator[str]:
    yield from exceptions.__all__


@pytest.mark.parametrize("name", list(public_exceptions()))
def test_every_exception_has_its_section(name: str) -> None:
    assert name in SECTIONS
    if name not in WORDLESS:
        own = [quote for section, quote in QUOTES if section == name]
        assert any(is_said(quote, by=name) for quote in own), f"nothing quoted is what {name} says"


def test_no_section_is_about_what_does_not_exist() -> None:
    assert set(SECTIONS) == set(exceptions.__all__)


@pytest.mark.parametrize(("section", "quote"), QUOTES)
def test_what_is_quoted_stands_in_the_code(section: str, quote: str) -> None:
    assert section
    assert len(quote.strip(ANYTHING + " .:")) > 8, "too little to find anything by"
    assert is_said(quote, by="") or any(is_said(quote, by=name) for name in sentences()), quote


def test_every_check_of_the_doctor_is_listed_in_its_order() -> None:
    (table,) = re.findall(r"^## What the doctor looks at\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE) == list(CHECKS)


def test_links_lead_somewhere() -> None:
    for name, anchor in re.findall(r"\]\(([\w.-]*)(?:#([\w-]+))?\)", PAGE):
        text = PAGE if not name else (ROOT / "docs" / name).read_text()
        headings = {
            re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-")
            for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        }
        assert not anchor or anchor in headings
