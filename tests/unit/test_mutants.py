"""Every mutant still applies, each step has one, and the page lists them; running them is ``make mutants``."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.security.mutants import ALL, which_do_not_apply
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


STEPS = range(1, 13)
WHOLE = "the whole step: "


def test_every_mutant_applies():
    gone = which_do_not_apply(ROOT)
    assert not gone, "\n  ".join(
        ("these checks are not where they were; say where they are, or that they are gone:", *gone)
    )


def test_every_mutant_names_attacks_that_are_there():
    for one in ALL:
        assert one.tests, one.name
        assert one.put != one.find, one.name
        for test in one.tests:
            file, _, function = test.partition("::")
            path = ROOT / "tests" / "security" / file
            assert f"def {function.partition('[')[0]}" in path.read_text(), (one.name, test)


def test_each_numbered_step_is_taken_out_as_a_whole_and_none_of_these_survives():
    whole = [one for one in ALL if one.what.startswith(WHOLE)]
    assert [one.part for one in whole] == [*STEPS]
    assert not any(one.survives for one in whole)


def test_each_numbered_step_and_the_reader_of_answers_has_mutants():
    parts = Counter(one.part for one in ALL if not one.survives)
    assert set(parts) == {*STEPS, "answers"}
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


def test_a_body_is_replaced_in_each_of_several_functions():
    changed = mutated(SOURCE, mutant(function="Gate.check, check", put="return True"))
    assert changed.count("return True") == 2
    assert "evil" not in changed


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


def test_a_body_that_is_so_already_is_said():
    with pytest.raises(DoesNotApplyError, match="already"):
        mutated(SOURCE, mutant(function="check", put="return name == 'evil'"))


def test_a_check_that_was_rewritten_or_moved_is_told_with_where_it_may_be_now(tmp_path):
    product = tmp_path / "agentweave_bus"
    product.mkdir()
    (tmp_path / "x.py").write_text(SOURCE)
    (product / "gate.py").write_text("def passes(name):\n    return name == 'good'\n")
    (product / "other.py").write_text("class Door:\n    def check(self):\n        return 1\n")
    rewritten, moved, gone = which_do_not_apply(
        tmp_path,
        (
            mutant(find="name == 'evil' or name.isspace() or not name"),
            mutant(find="name == 'good'"),
            mutant(function="Wall.check"),
        ),
    )
    assert "most alike is \"name == 'evil' or name.isspace()\" in line 6" in rewritten
    assert "it stands in agentweave_bus/gate.py, passes, line 1" in moved
    assert "x.py has Wall.check 0 times" in gone
    assert "a function of that name is agentweave_bus/other.py, Door.check, line 2" in gone


def test_a_mutant_that_is_gone_is_told_with_the_list_that_names_it(tmp_path):
    (told,) = which_do_not_apply(tmp_path, ALL[:1])
    assert ALL[0].file in told
    assert "named in tests/security/mutants/of_envelopes.py" in told


def test_the_page_is_written_from_what_was_seen():
    rows = [
        Row(mutant(), NOTICED, "test_x.py::test_y[a|b]", 1.0),
        Row(mutant(), SURVIVES, "another stands behind it", 1.0),
    ]
    empty = "<!-- begin noticed -->\n<!-- end noticed -->\n<!-- begin survivors -->\n<!-- end survivors -->\n"
    page = document_with(empty, rows)
    assert "| step 1: a check | `test_x.py::test_y[a\\|b]` |" in page
    assert "| step 1: a check | another stands behind it |" in page
