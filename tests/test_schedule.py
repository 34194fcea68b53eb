"""What a language run does over its length: the learning rate's rise and fall, and which rows come in an epoch."""

import math

import pytest
import torch
from torch import nn

from understudy.language import ppo, training
from understudy.run.interrupt import InterruptHandler
from understudy.run.progress import Progress
from understudy.run.store import Run


@pytest.fixture
def opened(tmp_path):
    """A function that opens a run of some total; of its model there is one weight, whose rate is 1."""

    def open_run(total: int = 100, **fields) -> training.TrainingRun:
        cfg = ppo.Config(model="m", data="d", reward=("length",), quiet=True, **fields)
        optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0}])
        run = Run.create(str(tmp_path / "run"), "run", {})
        return training.TrainingRun(
            cfg, run, None, optimizer, total, "policy", Progress("", total, quiet=True), InterruptHandler()
        )

    return open_run


def rates(run: training.TrainingRun, at: list[int]) -> list[float]:
    """Learning rates of iterations that begin after so many steps."""
    found = []
    for steps in at:
        run.steps = steps
        found.append(run.update_learning_rate())
    return found


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.0]),
        ("cosine", [1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.0]),
    ],
)
def test_the_learning_rate_goes_on_as_its_schedule_says(schedule, expected, opened):
    assert rates(opened(learning_rate_schedule=schedule), [0, 25, 50, 100]) == pytest.approx(expected)


def test_the_learning_rate_rises_over_the_warm_ups_share_of_the_run(opened):
    # a share of 0.1 of 100 steps: (done + 0.01) / 0.1 at 0, 0.05 and 0.09; then it is there
    found = rates(opened(learning_rate_schedule="constant", warmup=0.1), [0, 5, 9, 10, 60])

    assert found == pytest.approx([0.1, 0.6, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(("schedule", "half"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_the_stated_learning_rate_is_reached_after_the_warm_up(schedule, half, opened):
    # the first iteration after the warm-up begins at step 36 of 100; of the 64 that are left, 32 are half
    found = rates(opened(learning_rate_schedule=schedule, warmup=0.3), [0, 29, 36, 68, 100])

    assert found == pytest.approx([0.01 / 0.3, 1.0, 1.0, half, 1.0 if schedule == "constant" else 0.0])


def test_where_the_fall_began_is_part_of_a_checkpoint(opened):
    run = opened(learning_rate_schedule="linear", warmup=0.3)

    rates(run, [36])

    assert run.recipe_state == {"decay_from": 36} and "recipe_state" in training.CHECKPOINT_FIELDS


def test_the_last_minibatch_of_an_epoch_has_the_rows_that_are_left(opened):
    run = opened()

    epoch, second = [run.next_minibatch(20, 16) for _ in range(2)], run.next_minibatch(20, 16)

    assert [len(rows) for rows in epoch] == [16, 4] and len(second) == 16
    assert sorted([*epoch[0], *epoch[1]]) == list(range(20)) and second != epoch[0]


def test_a_minibatch_has_at_most_the_rows_there_are(opened):
    assert sorted(opened().next_minibatch(3, 16)) == [0, 1, 2]
