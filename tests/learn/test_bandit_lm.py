"""Every way of charging KL ends where arithmetic says; a baseline moves the noise of the gradient and not its mean."""

from functools import cache, partial

import pytest
import torch
from torch.testing import assert_close

from tests.bandit_lm import (
    ASTRAY,
    CHARGED,
    ONE,
    PAID,
    PAIRS,
    SEEDS,
    SMALL,
    Exam,
    baselines,
    by_grpo,
    drawn_pairs,
    exact_pairs,
    forward_optimum,
    learn,
    learn_pairs,
    scaled_optimum,
    shortsighted,
    total_variation,
    two_tokens,
    worst,
)
from understudy.advantage import group_relative, leave_one_out

NEAR = 0.02  # total variation, in the worst of the last ten iterates
FAR = 0.035  # what the smallest of the computed misses, 0.042, leaves after its noise
learning = pytest.mark.learning
seeds = pytest.mark.parametrize("seed", SEEDS)
TWO = two_tokens()


@cache
def astray(name: str) -> list[torch.Tensor]:
    return learn(ONE, ASTRAY[name](ONE), 0)


@pytest.mark.parametrize("task", [ONE, TWO], ids=["one token", "two"])
def test_the_optimum_is_far_from_the_reference(task):
    assert total_variation(task.tilted(0.0), task.tilted()) >= 0.2


@learning
@seeds
@pytest.mark.parametrize("name", PAID | CHARGED)
def test_the_optimum_is_found_by(name, seed):
    assert worst(learn(ONE, (PAID | CHARGED)[name](ONE), seed), ONE.tilted()) < NEAR


@learning
@seeds
def test_the_optimum_is_found_by_dpo_on_drawn_pairs(seed):
    assert worst(learn_pairs(ONE, drawn_pairs(ONE, PAIRS, seed), seed), ONE.tilted()) < NEAR


@learning
def test_the_optimum_is_found_by_dpo_on_exact_pairs():
    assert worst(learn_pairs(ONE, exact_pairs(ONE, each=500), 0), ONE.tilted()) < NEAR


@learning
@pytest.mark.parametrize("name", ASTRAY)
def test_control_the_optimum_is_missed_by(name):
    assert min(total_variation(p, ONE.tilted()) for p in astray(name)) > FAR


@learning
@pytest.mark.parametrize(
    ("name", "goal"),
    [
        ("ppo, bare k3 in the loss", forward_optimum(ONE)),  # KL(pi_ref, pi) instead of KL(pi, pi_ref)
        ("ppo, standardised, exact in the loss", scaled_optimum(ONE)),  # the KL is not divided by the deviation
        ("grpo, unscaled, group 8, exact in the loss", ONE.tilted(7 / 8)),  # an eighth of the mean is one's own score
    ],
)
def test_where_it_ends_instead_is_computed_for(name, goal):
    assert worst(astray(name), goal) < NEAR


@learning
def test_control_scaled_grpo_collapses_in_another_unit_of_reward():
    last = learn(SMALL, by_grpo(SMALL), 0)

    assert_close(SMALL.tilted(), ONE.tilted())
    assert min(total_variation(p, ONE.tilted()) for p in last) > 0.5


@learning
@seeds
@pytest.mark.parametrize("name", ["ppo, paid (k1)", "grpo, unscaled, paid (k1)"])
def test_on_two_tokens_kl_as_pay_finds_the_optimum(name, seed):
    assert worst(learn(TWO, PAID[name](TWO), seed), TWO.tilted()) < NEAR


@learning
@pytest.mark.parametrize("name", ["ppo, k3 in the loss", "ppo, exact in the loss"])
def test_on_two_tokens_kl_in_the_loss_ends_where_no_token_answers_for_a_later_ones(name):
    last = learn(TWO, CHARGED[name](TWO), 0)

    assert worst(last, shortsighted(TWO)) < NEAR
    assert min(total_variation(p, TWO.tilted()) for p in last) > 0.1


@pytest.fixture(scope="module")
def exam() -> Exam:
    return Exam()


@pytest.fixture(scope="module")
def plain(exam):
    """The expected gradient of reward to go, without a baseline."""
    return exam.mean(exam.gradients(exam.advantage(baselines(exam)["none"])))


def test_the_enumerated_values_are_those_of_the_answers(exam):
    # after a prompt and a word: the mean over the last word; the chances of all answers to a prompt come to 1
    last = exam.logits[exam.states[:, 2]].softmax(-1).view(8, 8, 8, 8)[:, :, 0]
    after = (last * exam.score.view(8, 8, 8)).sum(-1)

    assert_close(exam.values()[9:].view(8, 8), after)
    assert_close(exam.chance.view(8, -1).sum(dim=1), torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("name", ["mean", "prompt", "critic"])
def test_the_expected_gradient_is_the_same_with_the_baseline(name, exam, plain):
    assert_close(exam.mean(exam.gradients(exam.advantage(baselines(exam)[name]))), plain)


def test_the_expected_gradient_is_the_same_with_any_state_baseline(exam, plain):
    at_random = 9 * torch.randn(len(exam.logits), generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    assert_close(exam.mean(exam.gradients(exam.advantage(at_random))), plain)


@pytest.mark.parametrize("lam", [0.95, 0.5, 0.0])
def test_a_perfect_critic_may_be_bootstrapped_from(lam, exam, plain):
    assert_close(exam.mean(exam.gradients(exam.advantage(exam.values(), lam=lam))), plain)


def test_control_a_wrong_critic_may_not_be_bootstrapped_from(exam, plain):
    moved = exam.mean(exam.gradients(exam.advantage(2 * exam.values(), lam=0.0)))

    assert (moved - plain).abs().max() > 0.1


def test_each_baseline_that_knows_more_leaves_less_noise(exam):
    noise = [exam.variance(exam.gradients(exam.advantage(value))) for value in baselines(exam).values()]

    assert noise == sorted(noise, reverse=True)
    assert noise[-1] < 0.95 * noise[-2]


def test_the_critic_is_within_a_twentieth_of_the_best_state_baseline(exam):
    critic, best = (
        exam.variance(exam.gradients(exam.advantage(values))) for values in (exam.values(), exam.best_baseline())
    )

    assert best < critic < 1.05 * best


def test_a_shorter_trace_from_a_perfect_critic_leaves_less_noise(exam):
    noise = [exam.variance(exam.gradients(exam.advantage(exam.values(), lam=lam))) for lam in (1.0, 0.95, 0.5, 0.0)]

    assert noise == sorted(noise, reverse=True)


@learning
def test_a_critic_that_learnt_leaves_nearly_as_little_noise_as_a_perfect_one(exam):
    learnt, true = (
        exam.variance(exam.gradients(exam.advantage(values))) for values in (exam.learnt_values(51_200), exam.values())
    )

    assert true < learnt < 1.2 * true


def test_leaving_one_out_keeps_the_expected_gradient(exam, plain):
    mean, noise = exam.pairs(leave_one_out)

    assert_close(mean, plain)
    assert noise < exam.variance(exam.gradients(exam.advantage(baselines(exam)["none"])))


def test_a_groups_own_mean_of_two_halves_the_expected_gradient(exam, plain):
    # 1 - 1/2: half of the baseline is the answer's own score
    mean, _ = exam.pairs(partial(group_relative, scale_by_std=False))

    assert_close(mean, plain / 2)
