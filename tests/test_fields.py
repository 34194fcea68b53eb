"""No config field of a language recipe without a test that shows what it does."""

import ast
import dataclasses
from pathlib import Path

import pytest

from tests.fields import CONFIGS, EVERY_FAMILY, PAGE, TABLE, page

HERE = Path(__file__).parent
NAMED = sorted({test for rows in TABLE.values() for tests in rows.values() for test in tests} | {*EVERY_FAMILY})


@pytest.mark.parametrize("recipe", CONFIGS)
def test_every_field_has_a_row_and_every_row_a_field(recipe):
    fields = {field.name for field in dataclasses.fields(CONFIGS[recipe])}

    assert fields == {*TABLE["every recipe"], *TABLE[recipe]}


@pytest.mark.parametrize("path", sorted({test.split("::")[0] for test in NAMED}))
def test_every_named_test_is_there(path):
    there = {node.name for node in ast.parse((HERE / path).read_text()).body if isinstance(node, ast.FunctionDef)}

    assert {test.split("::")[1] for test in NAMED if test.startswith(f"{path}::")} <= there


def test_a_row_names_at_least_one_test():
    assert all(tests for rows in TABLE.values() for tests in rows.values())


def test_the_page_is_what_the_table_says():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.fields"
