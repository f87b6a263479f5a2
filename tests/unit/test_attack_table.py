"""The page on security says what the tests do, no more and no less."""

from __future__ import annotations

import pytest

from tests.security import attack_table


@pytest.fixture(scope="module")
def suite():
    return attack_table.collected()


def test_the_page_is_what_the_tests_say(suite):
    written = attack_table.DOCUMENT.read_text()
    assert attack_table.document_with(written, *suite) == written, "run `make attacks` and look at the change"


def test_every_test_attacks_or_says_why_not(suite):
    attacks, others = suite
    assert attack_table.unmarked_without_a_word(others) == []
    assert {one.by for one in attacks} == set(attack_table.Adversary)
    assert {one.where for one in attacks} == set(attack_table.Layer) | set(attack_table.Step) - {
        attack_table.Step.ROOM  # what a greedy caller does to others is shown in tests/faults
    }


@pytest.mark.parametrize("says", ["", "Refused, somehow.", "An honest call."])
def test_a_test_without_a_word_is_named(says):
    silent = attack_table.Unmarked("test_x.py", "test_y", says)
    spoken = [
        attack_table.Unmarked("test_x.py", "test_z", f"{word}: z") for word in ("Honest", "Not protected")
    ]
    assert attack_table.unmarked_without_a_word([silent, *spoken]) == ["test_x.py::test_y"]
