"""The list of `scripts/mutants` fits the fake as it is; that each is caught is for the script to show."""

from __future__ import annotations

import ast

import pytest

from tests.contract.mutants import FAKE, MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what[:60])
def test_each_mutant_changes_one_place_and_is_still_python(mutant: Mutant) -> None:
    ast.parse(mutant.apply((ROOT / FAKE / mutant.file).read_text(encoding="utf-8")))


def test_there_are_enough_of_them() -> None:
    assert len(MUTANTS) >= 25


@pytest.mark.parametrize("text", ["", "a a"])
def test_a_list_that_is_out_of_date_says_so(text: str) -> None:
    with pytest.raises(ValueError, match="out of date"):
        Mutant("type1.py", "a", "b").apply(text)
