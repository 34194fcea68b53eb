"""Step 2: the one bridge from a row's score to its steps' rewards, and the way back."""

import torch
from torch.testing import assert_close

from tests.records import flags, row
from understudy.score import at_last_step, episode_score

MASK = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()


def test_a_score_is_paid_at_the_last_chosen_step():
    expected = torch.tensor([[0, 0, 5, 0], [0, 0, 0, 6], [7, 0, 0, 0], [0, 0, 0, 0.0]])
    assert_close(at_last_step(torch.tensor([5.0, 6, 7, 8]), MASK), expected)


def test_a_missing_score_of_an_empty_row_is_not_paid():
    assert_close(at_last_step(torch.tensor([float("nan")]), flags(0, 0)), row(0, 0))


def test_the_score_of_a_row_is_the_sum_of_its_chosen_steps_rewards():
    reward = torch.tensor([[9, 1, 2, 9], [1, 9, 2, 3], [4, 9, 9, 9], [9, 9, 9, 9.0]])
    assert_close(episode_score(reward, MASK), torch.tensor([3.0, 6, 4, 0]))


def test_a_score_paid_comes_back_as_the_rows_score():
    score = torch.tensor([5.0, -6, 7])
    assert_close(episode_score(at_last_step(score, MASK[:3]), MASK[:3]), score)
