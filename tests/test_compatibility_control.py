"""One environment of each kind of `make compatibility` trains, or is refused, as the table says."""

import importlib
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))
bench = importlib.import_module("compatibility_control")
sys.path.pop()
PICKED = [
    "Guess (see float64 far from 0)",
    "Guess (see Dict, nested, odd keys)",
    "Guess (do Box, 0 to 1000)",
    "Guess (do Box, 100 to 200)",
    "Guess (mask method)",
    "Guess (mask Dict, do MultiDiscrete)",
    "GuessRows",
    "Guess (own SyncVectorEnv, SAME_STEP)",
    "InfoOfChangingShape",
    "UnixClock",
    "Board",
    "Guess (see Text)",
    "Guess (see number as key)",
    "Guess (do Dict)",
    "Guess (fault raises)",
]
CASES = {case.name: case for case in bench.CASES if case.name in PICKED}


@pytest.mark.parametrize("name", PICKED)
def test_an_environment_trains_or_is_refused_as_the_table_says(name):
    result = bench.run(CASES[name])

    assert result["as_expected"], result


def test_the_table_has_sixty_environments_of_different_names():
    names = [case.name for case in bench.CASES]

    assert len(names) == len(set(names)) >= 60
    assert sum(case.margin is not None for case in bench.CASES) >= 48 and len(CASES) == len(PICKED)


def test_the_page_is_the_one_that_the_results_make():
    results = bench.json.loads(bench.RESULTS.read_text())

    assert bench.PAGE.read_text() == bench.page(results)
    assert [found["name"] for found in results] == [case.name for case in bench.CASES]
    assert all(found["as_expected"] for found in results)
