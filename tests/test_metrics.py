"""Lines of metrics over several iterations."""

from understudy.run.metrics import combine


def test_a_line_has_the_last_evaluation_and_the_mean_of_all_else():
    iterations = [
        {"loss": 1.0, "evaluation_kl": 0.1},
        {"loss": 3.0, "skipped": 1.0},
        {"loss": 5.0, "evaluation_kl": 0.5},
    ]

    assert combine(iterations) == {"loss": 3.0, "evaluation_kl": 0.5, "skipped": 1.0}
