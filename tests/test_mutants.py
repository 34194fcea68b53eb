"""The table of mutants fits the code: `make mutants` takes an hour, and would say so only then."""

from pathlib import Path

import pytest

from tests.mutants import EQUIVALENT, HAND, HAND_ONLY, ROOT, TESTS

SOURCES = {file: (ROOT / "understudy" / file).read_text() for file in TESTS}


def test_every_file_with_a_mutant_has_tests():
    assert {mutant.file for mutant in HAND} | {file for file, *_ in EQUIVALENT} | HAND_ONLY <= TESTS.keys()


def test_every_hand_made_mutant_changes_one_place():
    hits = {(mutant.file, mutant.old): SOURCES[mutant.file].count(mutant.old) for mutant in HAND if mutant.at is None}

    assert {key: count for key, count in hits.items() if count != 1} == {}


@pytest.mark.parametrize("file", TESTS)
def test_the_tests_of_a_mutant_are_there(file):
    for test in TESTS[file]:
        path, _, name = test.partition("::")
        text = (Path(__file__).parent / path).read_text()
        assert not name or f"def {name.partition('[')[0]}(" in text, test


def test_every_equivalent_mutant_is_of_a_line_that_is_there():
    lines = {file: " ".join(source.split()) for file, source in SOURCES.items()}

    assert [key for key in EQUIVALENT if key[1] not in lines[key[0]]] == []
