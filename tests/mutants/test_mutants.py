"""The list of mutants fits the code: each can still be put in, and its tests are still there. `make
test-mutants` runs them."""

import ast

import pytest

from tests.mutants.mutants import MUTANTS, Mutant
from tests.mutants.run import ROOT, problem_of


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_still_be_put_in(mutant: Mutant) -> None:
    assert not problem_of(mutant)


def test_the_tests_that_must_fail_are_there() -> None:
    for test in {test for mutant in MUTANTS for test in mutant.tests}:
        path, _, name = test.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in functions, test


def test_names_are_different_and_there_are_enough() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 60
    assert all(mutant.tests for mutant in MUTANTS)
