"""Lines of metrics over several iterations."""

import math

from understudy.run.metrics import combine


def test_a_line_has_the_last_evaluation_and_the_mean_of_all_else():
    iterations = [
        {"loss": 1.0, "evaluation_kl": 0.1},
        {"loss": 3.0, "skipped": 1.0},
        {"loss": 5.0, "evaluation_kl": 0.5},
    ]

    assert combine(iterations) == {"loss": 3.0, "evaluation_kl": 0.5, "skipped": 1.0}


def test_an_iteration_without_a_value_does_not_empty_the_line():
    assert combine([{"kl": 1.0}, {"kl": math.nan}, {"kl": 3.0}]) == {"kl": 2.0}
    assert math.isnan(combine([{"kl": math.nan}, {"kl": math.nan}])["kl"])
