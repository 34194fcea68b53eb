"""The live display: which columns, how many lines, and the trend."""

import io

import pytest
from rich.console import Console

from understudy.run.progress import BARS, MAX_BARS, MAX_ROWS, Progress, Trend, columns_for

CONTROL = {
    "steps": 10,
    "episode_return_mean": 1.0,
    "episode_length_mean": 5.0,
    "explained_variance": 0.5,
    "kl_old": 0.01,
}
LANGUAGE = {"steps": 10, "score_mean": 1.0, "kl_reference": 2.0, "length_mean": 7.0, "stopped": 0.5, "loss": 3.0}
SUPERVISED = {"steps": 10, "loss": 3.0, "accuracy": 0.75, "grad_norm": 1.0}


def shown(metrics: dict) -> list[str]:
    return [name for name, _, _ in columns_for(metrics) if name in metrics]


@pytest.mark.parametrize("metrics", [CONTROL, LANGUAGE, SUPERVISED])
def test_the_columns_fit_the_recipe(metrics):
    unshown = {"loss"} if metrics is LANGUAGE else {"grad_norm"}

    assert shown(metrics) == [name for name in metrics if name not in unshown]


def test_a_trend_rises_from_the_lowest_bar_to_the_highest():
    trend = Trend()
    for value in (0.0, 7.0, 3.0, None, float("nan"), 14.0):
        trend.add(value)

    # 14 over 7 steps: 0, 3.5 (rounds to even, 4), 1.5 (2), 7
    assert str(trend) == "".join(BARS[i] for i in (0, 4, 2, 7))


def test_a_trend_of_a_long_run_has_the_means_of_equal_shares():
    trend = Trend()
    for value in range(4 * MAX_BARS):  # rises evenly: so do the bars
        trend.add(float(value))

    assert MAX_BARS // 2 <= len(trend.means) < MAX_BARS
    steps = [b - a for a, b in zip(trend.means, trend.means[1:], strict=False)]
    assert steps == [trend.iterations_per_bar] * len(steps)
    assert trend.means[0] == (trend.iterations_per_bar - 1) / 2
    assert str(trend) == "".join(sorted(str(trend)))


def test_a_trend_of_one_value_and_of_none_can_be_shown():
    assert str(Trend()) == ""
    trend = Trend()
    trend.add(3.0)
    assert str(trend) == BARS[0]


def test_the_last_ten_lines_stay_on_a_terminal(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, legacy_windows=False, _environ={"TERM": "xterm"})
    monkeypatch.setattr("understudy.run.progress.Console", lambda stderr: terminal)
    with Progress("ppo", 2500) as progress:
        for i in range(25):
            progress.show(CONTROL | {"steps": 100 * (i + 1)})

    lines = screen.getvalue().rpartition("ppo")[2].splitlines()
    counts = [line.split()[0] for line in lines if line.strip()[:1].isdigit()]
    assert counts == [f"{100 * i:,}" for i in range(26 - MAX_ROWS, 26)]
    assert "100%" in "".join(lines)


def test_elsewhere_an_iteration_is_one_plain_line(capsys):
    with Progress("ppo", 100, interval=0.0) as progress:
        progress.show(LANGUAGE | {"seconds_left": 61})

    [line] = capsys.readouterr().err.splitlines()
    assert line == "ppo: steps 10  score 1.000  KL(reference) 2.00  length 7.0  ended 50%  time left 1:01"
