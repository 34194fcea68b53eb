"""Step 2: the one bridge from a row's score to its steps' rewards, and the way back."""

import pytest
import torch
from torch.testing import assert_close

from tests.records import flags, row
from understudy.reward import (
    adapt_kl_reference_coef,
    episode_score,
    handle_truncation,
    kl_reward,
    overlong_penalty,
    reward_at_last_step,
)

MASK = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()


def test_a_score_is_paid_at_the_last_chosen_step():
    expected = torch.tensor([[0, 0, 5, 0], [0, 0, 0, 6], [7, 0, 0, 0], [0, 0, 0, 0.0]])
    assert_close(reward_at_last_step(torch.tensor([5.0, 6, 7, 8]), MASK), expected)


def test_a_missing_score_of_an_empty_row_is_not_paid():
    assert_close(reward_at_last_step(torch.tensor([float("nan")]), flags(0, 0)), row(0, 0))


def test_the_score_of_a_row_is_the_sum_of_its_chosen_steps_rewards():
    reward = torch.tensor([[9, 1, 2, 9], [1, 9, 2, 3], [4, 9, 9, 9], [9, 9, 9, 9.0]])
    assert_close(episode_score(reward, MASK), torch.tensor([3.0, 6, 4, 0]))


def test_a_score_paid_comes_back_as_the_rows_score():
    score = torch.tensor([5.0, -6, 7])
    assert_close(episode_score(reward_at_last_step(score, MASK[:3]), MASK[:3]), score)


NAN = float("nan")
# row 0 ends by itself, row 1 is cut by the limit, row 2 has no score
CHOSEN = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 1, 0]]).bool()
TERMINATED = torch.tensor([[0, 0, 1], [0, 0, 0], [0, 1, 0]]).bool()
TRUNCATED = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]).bool()
EITHER = TERMINATED | TRUNCATED
NONE = torch.zeros_like(TRUNCATED)


@pytest.mark.parametrize(
    ("how", "paid", "terminated", "truncated", "kept"),
    [
        ("terminal", [5, 7 - 2, 0], EITHER, NONE, [1, 1, 0]),  # less the missing-EOS penalty of 2
        ("penalty", [5, -3, 0], EITHER, NONE, [1, 1, 0]),
        ("bootstrap", [5, 0, 0], TERMINATED, TRUNCATED, [1, 1, 0]),
        ("drop", [5, 0, 0], TERMINATED, TRUNCATED, [1, 0, 0]),
    ],
)
def test_a_row_cut_by_its_limit_is_paid_as_the_recipe_says(how, paid, terminated, truncated, kept):
    score = torch.tensor([5.0, 7.0, NAN])
    found = handle_truncation(score, TERMINATED, TRUNCATED, CHOSEN, mode=how, penalty=-3.0, missing_eos_penalty=2.0)

    assert_close(found[0], torch.tensor(paid, dtype=torch.float32))
    assert torch.equal(found[1], terminated)
    assert torch.equal(found[2], truncated)
    assert torch.equal(found[3], CHOSEN & torch.tensor(kept).bool()[:, None])


def test_a_cut_row_needs_no_score_where_none_is_paid():
    score = torch.tensor([NAN, NAN, NAN])
    found = handle_truncation(
        score, TERMINATED, TRUNCATED, CHOSEN, mode="bootstrap", penalty=0.0, missing_eos_penalty=0.0
    )

    assert found[3].any(dim=1).tolist() == [False, True, False]


def test_the_kl_is_paid_step_by_step():
    # -0.5 * (-1 - -3) = -1; the other way round +0.5; nothing outside the mask
    paid = kl_reward(row(-1, -2, NAN), row(-3, -1, NAN), flags(1, 1, 0), coef=0.5)
    assert_close(paid, row(-1, 0.5, 0))


@pytest.mark.parametrize(
    ("kl", "coef"),
    [
        (6.6, 0.2 * (1 + 0.1 * 256 / 10_000)),  # 10 % above the target
        (60.0, 0.2 * (1 + 0.2 * 256 / 10_000)),  # at most 20 %
        (0.0, 0.2 * (1 - 0.2 * 256 / 10_000)),
        (6.0, 0.2),
    ],
)
def test_the_kl_coefficient_follows_its_target(kl, coef):
    assert adapt_kl_reference_coef(0.2, kl, target=6.0, num_rows=256, horizon=10_000) == pytest.approx(coef, rel=1e-12)


def test_a_long_completion_is_charged_more_and_more():
    # limit 20, margin 4: nothing up to 16, a quarter a token, 1 at the limit
    assert_close(
        overlong_penalty(torch.tensor([5.0, 16, 17, 20]), limit=20, margin=4), torch.tensor([0, 0, -0.25, -1.0])
    )
