"""Every mutant still applies, each step has one, and the page lists them; running them is ``make mutants``."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from tests.security.mutants import ALL
from tests.security.mutants.mutant import DoesNotApplyError, Mutant, mutated
from tests.security.mutants.page import NOTICED, PAGE, SURVIVES, Row, document_with
from tests.security.mutants.workshop import ROOT

SOURCE = '''
class Gate:
    def check(self, name: str) -> bool:
        """Say whether it may pass."""
        # a comment
        if name == "evil" or name.isspace():
            return False
        return True

def check(name):
    return name == "evil"
'''


def mutant(function="Gate.check", find="", put="False"):
    return Mutant(part=1, what="a check", file="x.py", function=function, find=find, put=put)


def test_every_mutant_applies_and_names_attacks_that_are_there():
    sources = {one.file: (ROOT / one.file).read_text() for one in ALL}
    for one in ALL:
        changed = mutated(sources[one.file], one)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(sources[one.file])), one.name
        for test in one.tests:
            file, _, function = test.partition("::")
            path = ROOT / "tests" / "security" / file
            assert f"def {function.partition('[')[0]}" in path.read_text(), (one.name, test)
        assert one.tests, one.name


def test_each_numbered_step_and_the_reader_of_answers_has_mutants():
    parts = Counter(one.part for one in ALL if not one.survives)
    assert set(parts) == {*range(1, 13), "answers"}
    assert max(Counter(one.name for one in ALL).values()) == 1


def test_the_page_lists_them_all():
    page = PAGE.read_text()
    for one in ALL:
        assert f"| {one.name} |" in page, f"{one.name}: run `make mutants WRITE=--write`"
        assert not one.survives or f"| {one.name} | {one.survives} |" in page
    assert page.count("\n| step") + page.count("\n| answers") == len(ALL)


def test_an_expression_is_replaced_in_its_function_only():
    changed = mutated(SOURCE, mutant(find="name == 'evil'"))
    assert "if False or name.isspace()" in changed
    assert "return name == 'evil'" in changed


def test_a_body_is_replaced_as_a_whole():
    assert "isspace" not in mutated(SOURCE, mutant(put="return True"))


@pytest.mark.parametrize(
    "wrong",
    [
        mutant(find="name == 'good'"),
        mutant(find="name"),
        mutant(function="Gate.gone"),
        mutant(function="Other.check"),
    ],
    ids=["not there", "twice", "no such method", "no such class"],
)
def test_what_is_not_there_once_is_said(wrong):
    with pytest.raises(DoesNotApplyError, match="not once"):
        mutated(SOURCE, wrong)


def test_the_page_is_written_from_what_was_seen():
    rows = [
        Row(mutant(), NOTICED, "test_x.py::test_y[a|b]", 1.0),
        Row(mutant(), SURVIVES, "another stands behind it", 1.0),
    ]
    empty = "<!-- begin noticed -->\n<!-- end noticed -->\n<!-- begin survivors -->\n<!-- end survivors -->\n"
    page = document_with(empty, rows)
    assert "| step 1: a check | `test_x.py::test_y[a\\|b]` |" in page
    assert "| step 1: a check | another stands behind it |" in page
